"""What models write, and the public texts before their prompts."""

import copy

import numpy as np
import pytest
from letters import CONTEXT, WORLD, ids, knowing_model, letter_tokenizer, llama
from tiny import generate_answers

from fedpt_flwr.errors import DataError, ModelError
from fedpt_flwr.writing import draw_texts, few_shot_prompt


@pytest.fixture(scope="module")
def tokenizer():
    return letter_tokenizer()


@pytest.fixture(scope="module")
def knowing(tokenizer):
    return knowing_model(tokenizer)


def test_answers_do_not_depend_on_the_others_in_the_batch(knowing, tokenizer):
    prompts = [ids(tokenizer, example.prompt) for example in WORLD]
    batched, num_written = generate_answers(knowing, prompts, tokenizer=tokenizer, max_new_tokens=24, batch_size=4)
    alone = [
        generate_answers(knowing, [prompt], tokenizer=tokenizer, max_new_tokens=24, batch_size=1)[0][0]
        for prompt in prompts
    ]
    assert num_written.tolist() == [len(answer) + 1 for answer in batched]  # one token a letter, and the end
    assert batched == alone == [*(example.answer for example in WORLD[:3]), "colour = red ;ok"]


def test_an_answer_ends_at_the_token_limit_or_before_the_end_token(knowing, tokenizer):
    prompts = [ids(tokenizer, WORLD[0].prompt)]
    answers, num_written = generate_answers(knowing, prompts, tokenizer=tokenizer, max_new_tokens=6)
    assert (answers, num_written.tolist()) == (["filter"], [6])
    knowing.generation_config.eos_token_id = [2, *ids(tokenizer, ";")]
    try:
        answers, num_written = generate_answers(knowing, prompts, tokenizer=tokenizer, max_new_tokens=24)
        assert (answers, num_written.tolist()) == (["filter = jute "], [len("filter = jute ;")])
    finally:
        knowing.generation_config.eos_token_id = 2


def test_a_models_own_decoding_habits_are_switched_off(knowing, tokenizer):
    prompts = [ids(tokenizer, WORLD[0].prompt)]
    habitual = copy.deepcopy(knowing)
    habitual.generation_config.update(do_sample=True, temperature=5.0, top_k=50, repetition_penalty=3.0)
    habitual.generation_config.no_repeat_ngram_size = 1
    answers, _ = generate_answers(habitual, prompts, tokenizer=tokenizer, max_new_tokens=24)
    assert answers == ["filter = jute ;ok"]


def test_prompts_that_leave_no_room_are_refused_before_anything_is_generated(knowing, tokenizer):
    generate_answers(knowing, [[5] * (CONTEXT - 3)], tokenizer=tokenizer, max_new_tokens=3)
    with pytest.raises(DataError, match=r"data\.test, item 2: .*64 tokens, got '62 \+ 3'"):
        generate_answers(knowing, [[5], [5] * (CONTEXT - 2)], tokenizer=tokenizer, max_new_tokens=3, place="data.test")
    with pytest.raises(DataError, match="prompts, item 1: a prompt must have at least one token"):
        generate_answers(knowing, [[]], tokenizer=tokenizer, max_new_tokens=3)


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer):
    endless, model = copy.deepcopy(tokenizer), llama(0)
    endless.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ModelError, match="must have a token that ends an answer"):
        generate_answers(model, [[5]], tokenizer=endless, max_new_tokens=3)


def test_few_shot_prompts_take_as_many_texts_as_fit():
    prompt, texts = [1, 50, 51], [[10] * 4, [11] * 5, [12] * 30, [13] * 3]
    for room in range(3, 50):
        drawn = draw_texts(texts, shots=2, room=room - len(prompt), generator=np.random.default_rng(room))
        result, used = few_shot_prompt(prompt, drawn, max_prompt_tokens=room, bos_token_id=1)
        assert used == len(drawn)
        assert len(result) <= room
        assert result[0] == 1
        assert result[-2:] == [50, 51]
        assert result.count(1) == 1
        # shortest text: 3 tokens; the two longest of the short ones: 4 + 5
        assert used == 0 if room < 6 else used >= 1 if room < 12 else used == 2
        assert len(result) == 3 + sum(len(text) for text in texts if text[0] in result)
    assert draw_texts(texts, shots=0, room=50, generator=np.random.default_rng(0)) == []
    assert few_shot_prompt(prompt, [], max_prompt_tokens=50) == (prompt, 0)


def test_where_there_is_less_room_a_prompt_has_the_first_of_the_same_texts():
    texts = [[10] * 4, [11] * 5, [12] * 2]
    assert few_shot_prompt([50], texts, max_prompt_tokens=12) == ([*texts[0], *texts[1], *texts[2], 50], 3)
    assert few_shot_prompt([50], texts, max_prompt_tokens=11) == ([*texts[0], *texts[1], 50], 2)
    assert few_shot_prompt([50], texts, max_prompt_tokens=9) == ([*texts[0], 50], 1)  # not the third, which would fit
    assert few_shot_prompt([50] * 9, texts, max_prompt_tokens=8) == ([50] * 9, 0)


def test_few_shot_texts_are_the_same_for_the_same_seed():
    texts = [[index] * 3 for index in range(10, 30)]

    def draw(seed):
        return draw_texts(texts, shots=4, room=39, generator=np.random.default_rng(seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
