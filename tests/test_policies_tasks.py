"""Tasks have the right answers, in tokens that read back as text."""

from __future__ import annotations

import numpy as np
import pytest

from lambda_hat.policies.tasks import AdditionTask, ModularTask, enumerate_completions, rewards
from lambda_hat.policies.tokenizer import BOS, EOS, PAD, Tokenizer
from lambda_hat.spec import InvalidInput


def test_text_survives_tokens():
    tokenizer = Tokenizer("0123+=")
    ids = tokenizer.encode("12+30=")
    assert ids == [4, 5, 7, 6, 3, 8]
    assert tokenizer.vocab_size == 9
    assert tokenizer.decode([BOS, *ids, EOS, PAD]) == "12+30="
    with pytest.raises(InvalidInput, match=r"got '1\*2' with \['\*'\]"):
        tokenizer.encode("1*2")


@pytest.mark.parametrize(
    ("task", "number", "right"), [(ModularTask(), 121, lambda a, b: (a + b) % 11), (AdditionTask(), 8100, lambda a, b: a + b)]
)
def test_every_prompt_has_its_answer(task, number, right):
    prompts = task.prompts()
    assert len(prompts.texts) == len(set(prompts.texts)) == task.num_prompts == number
    decode = task.tokenizer.decode
    for text, tokens, length, answer in zip(*prompts, strict=True):
        assert tokens[0] == BOS
        assert np.all(tokens[length:] == PAD)
        assert decode(tokens[:length]) == text
        a, b = text.removesuffix("=").split("+")
        end = list(answer).index(EOS)
        assert decode(answer[:end]) == str(right(int(a), int(b)))
        assert np.all(answer[end + 1 :] == PAD)
    assert prompts.answers.shape[1] == task.max_length


def test_only_the_whole_answer_is_rewarded():
    task = ModularTask()
    answers = task.custom_prompts(["5+5="] * 5, ["10"] * 5).answers
    one, zero = task.tokenizer.encode("10")
    completions = [[one, zero, EOS], [one, EOS, PAD], [one, zero, zero], [zero, one, EOS], [EOS, PAD, PAD]]
    assert list(rewards(np.array(completions, np.int32), answers)) == [1, 0, 0, 0, 0]


def test_custom_prompts_use_the_tasks_characters():
    prompts = ModularTask().custom_prompts(["1+2+3=", "4="], ["6", "4"])
    assert list(prompts.lengths) == [7, 3]
    with pytest.raises(InvalidInput, match="at most 2 characters"):
        ModularTask().custom_prompts(["9="], ["999"])


def test_enumeration_is_complete():
    tokens, mask = enumerate_completions(4, 3)
    assert len(tokens) == len({tuple(row[own]) for row, own in zip(tokens, mask, strict=True)}) == 1 + 3 + 9 * 4
    # The probabilities of tokens drawn independently sum to one.
    p = np.array([0.1, 0.2, 0.3, 0.4])
    assert np.sum(np.prod(np.where(mask, p[tokens], 1.0), axis=1)) == pytest.approx(1)
