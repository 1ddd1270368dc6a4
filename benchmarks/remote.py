"""How much of the proxy is left when a remote large model shows the likeliest k tokens only.

    fedpt serve RUN                      # or any other service that has the run's large model
    python benchmarks/remote.py RUN http://127.0.0.1:8080 --items 48

For each k: how many greedy and sampled answers through the service are, token by token, those of the proxy whose large
model is here; and, at every place of the local greedy answers, how often the best token is the same and how far the
distributions are apart (total variation), with hidden tokens ruled out (restricted) and filled in as the untuned
model would.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from fedpt_flwr.config import RemoteConfig, parse_run_config
from fedpt_flwr.data import tokenize_prompts
from fedpt_flwr.models import load_tokenizer
from fedpt_flwr.proxy import FILL, RESTRICT, ProxyModel
from fedpt_flwr.remote import connect
from fedpt_flwr.runs import find_run, read_json
from fedpt_flwr.sources import held_out_items


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("url")
    parser.add_argument("--model", default="", help="the large model's name there")
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("--hidden", default="auto", help="remote.hidden")
    parser.add_argument("--tops", type=int, nargs="+", default=[0, 1, 5, 20, 100], help="0: all")
    options = parser.parse_args()
    run = find_run(options.run)
    torch.set_num_threads(1)
    config = parse_run_config(read_json(run / "config.json")["run_config"])
    tokenizer = load_tokenizer(str((run / "proxy").resolve()))
    local = ProxyModel.from_pretrained(run)
    items = held_out_items(config.data, "test", seed=config.seed).first(options.items)
    prompts = tokenize_prompts([item.prompt for item in items.examples], tokenizer, max_length=None)
    limit = config.scoring.max_new_tokens
    settings = RemoteConfig(model=options.model, hidden=options.hidden, cache="off")

    def write(proxy: ProxyModel, number: int, *, samples: bool) -> list[int]:
        ids = torch.tensor([prompts[number]])
        how = {"do_sample": True, "top_k": 0, "seed": number} if samples else {"do_sample": False}
        drafts = getattr(proxy.large, "draft_tokens", 3)
        output = proxy.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, draft_tokens=drafts, **how
        )
        return list(output[0, ids.shape[1] :].tolist())

    numbers = range(len(prompts))
    greedy = [write(local, number, samples=False) for number in numbers]
    sampled = [write(local, number, samples=True) for number in numbers]
    print(
        "| tokens shown | asked by | greedy answers | sampled answers | best token: restricted / filled | "
        "total variation: restricted / filled | requests | tokens sent |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for top in options.tops:
        large = connect(options.url, tokenizer, replace(settings, top_logprobs=top))
        remote = ProxyModel.from_pretrained(run, large=large)
        same = [
            sum(write(remote, number, samples=samples) == answers[number] for number in numbers)
            for answers, samples in ((greedy, False), (sampled, True))
        ]
        spent = large.endpoint.usage.copy()
        best, apart = {RESTRICT: 0, FILL: 0}, {RESTRICT: 0.0, FILL: 0.0}
        places = 0
        with torch.no_grad():
            for number in numbers:
                text = torch.tensor([prompts[number] + greedy[number][:-1]])
                kept = len(greedy[number])
                truth = local(text, logits_to_keep=kept).logits[0]
                places += kept
                for hidden in (RESTRICT, FILL):
                    found = remote(text, logits_to_keep=kept, hidden=hidden).logits[0]
                    best[hidden] += int((found.argmax(-1) == truth.argmax(-1)).sum())
                    apart[hidden] += float((found.softmax(-1) - truth.softmax(-1)).abs().sum() / 2)
        shares = " / ".join(f"{best[hidden] / places:.3f}" for hidden in (RESTRICT, FILL))
        distances = " / ".join(f"{apart[hidden] / places:.3f}" for hidden in (RESTRICT, FILL))
        print(
            f"| {large.endpoint.shows} | {large.endpoint.api} | {same[0]}/{len(prompts)} | {same[1]}/{len(prompts)} | "
            f"{shares} | {distances} | {spent.requests} | {spent.tokens_sent} |",
            flush=True,
        )
        large.endpoint.close()
    print(f"\n{len(prompts)} items, {places} places, alpha {local.alpha:g}, plausibility {local.plausibility:g}")


if __name__ == "__main__":
    main()
