"""Real architectures with their own tokenizers, through the method: ``benchmarks/conformance.py`` has the cells."""

import copy
from pathlib import Path

import pytest
import torch
from reference import reference_scores

from benchmarks import conformance
from benchmarks.families import FAMILIES, LARGE_ONLY, Checkpoints
from fedpt_flwr.config import TuningConfig
from fedpt_flwr.data import collate_prompts, tokenize_prompts
from fedpt_flwr.models import load_causal_lm, load_tokenizer, make_tunable, tunable_arrays
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.vocabulary import match_vocabularies

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
    "ignore:Using .httpx. with .starlette.testclient. is deprecated",
    "ignore:The anyio.abc.BlockingPortal alias is deprecated:DeprecationWarning",
)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return Checkpoints(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_loaded_tuned_combined_drafted_and_stored(checkpoints, tmp_path, name):
    small_folder, large_folder = map(str, checkpoints.pair(name))
    tokenizer, large_tokenizer = load_tokenizer(small_folder), load_tokenizer(large_folder)
    assert match_vocabularies(large_tokenizer, tokenizer).id_map is None
    large, untuned = load_causal_lm(large_folder), load_causal_lm(small_folder)
    tuned = copy.deepcopy(untuned)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.mul_(1.05)

    adapted = make_tunable(copy.deepcopy(untuned), TuningConfig(mode="lora", lora_rank=2), seed=0)
    assert len(tunable_arrays(adapted)) >= 8
    full = tunable_arrays(make_tunable(copy.deepcopy(untuned), TuningConfig(), seed=0))
    assert sum(array.numel() for array in full.values()) == untuned.num_parameters()

    proxy = ProxyModel(large, tuned, untuned, tokenizer=tokenizer)
    prompts = tokenize_prompts(conformance.PROMPTS[:2], tokenizer, max_length=None)
    size = proxy.config.real_vocab_size
    expected = reference_scores(large, tuned, untuned, torch.tensor(prompts[1]), vocab_size=size)
    found = proxy(input_ids=torch.tensor([prompts[1]])).logits[0, :, :size]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-3)
    batch = collate_prompts(prompts, tokenizer.pad_token_id)
    texts = [
        proxy.generate(**batch, max_new_tokens=5, do_sample=False, draft_tokens=drafts).tolist() for drafts in (None, 2)
    ]
    assert texts[0] == texts[1]
    proxy.save_pretrained(tmp_path, large_ref=large_folder, untuned_ref=small_folder, tokenizer=tokenizer)
    again = ProxyModel.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=batch["input_ids"]).logits, proxy(input_ids=batch["input_ids"]).logits)
    assert again.generation_config.eos_token_id == proxy.generation_config.eos_token_id


ROWS = [*FAMILIES, *LARGE_ONLY]


@pytest.fixture(scope="module")
def subjects(checkpoints, tmp_path_factory):
    return {name: conformance.Subject(name, *checkpoints.pair(name), tmp_path_factory.mktemp("runs")) for name in ROWS}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "heading"), [(name, cell) for name in ROWS for cell in conformance.cells_of(name)])
def test_every_cell_of_the_table_holds(subjects, name, heading):
    assert conformance.CELLS[heading](subjects[name])


def test_the_docs_have_the_table_of_all_rows_and_no_cell_that_fails():
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert conformance.markdown({}).splitlines()[0] in table
    assert all(any(line.startswith(f"| {name} |") for line in table) for name in ROWS)
    assert "fails" not in "".join(table)
