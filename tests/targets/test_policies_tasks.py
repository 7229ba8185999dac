"""Tasks have the right answers, in tokens that read back as text."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from lambda_hat.specs.spec import InvalidInput
from lambda_hat.targets.policies.tasks import AdditionTask, FewShotAdditionTask, ModularTask, TokenizedTask, rewards
from lambda_hat.targets.policies.tokenizer import BOS, EOS, PAD, Tokenizer


def in_characters(task):
    return TokenizedTask(task, Tokenizer(task.characters))


def test_text_survives_tokens():
    tokenizer = Tokenizer("0123+=")
    ids = tokenizer.encode("12+30=")
    assert ids == [4, 5, 7, 6, 3, 8]
    assert tokenizer.vocab_size == 9
    assert tokenizer.decode([BOS, *ids, EOS, PAD]) == "12+30="
    with pytest.raises(InvalidInput, match=r"got '1\*2' with \['\*'\]"):
        tokenizer.encode("1*2")


FEW = FewShotAdditionTask(limit=12, examples=((3, 4), (9, 6)))


@pytest.mark.parametrize(
    ("task", "number", "right", "before"),
    [
        (ModularTask(), 121, lambda a, b: (a + b) % 11, ""),
        (AdditionTask(), 8100, lambda a, b: a + b, ""),
        (FEW, 144, lambda a, b: a + b, "3+4=7\n9+6=15\n"),
    ],
)
def test_every_prompt_has_its_answer(task, number, right, before):
    tokenized = in_characters(task)
    prompts, end_token = tokenized.prompts(), tokenized.end_token
    assert len(prompts.texts) == len(set(prompts.texts)) == task.num_prompts == number
    decode = tokenized.tokenizer.decode
    for text, tokens, length, answer in zip(*prompts, strict=True):
        assert tokens[0] == BOS
        assert np.all(tokens[length:] == PAD)
        assert decode(tokens[:length]) == text
        a, b = text.removeprefix(before).removesuffix("=").split("+")
        end = list(answer).index(end_token)
        assert decode(answer[:end]) == tokenized.text(answer) == str(right(int(a), int(b)))
        assert np.all(answer[end + 1 :] == PAD)
    assert prompts.answers.shape[1] == tokenized.max_length


def test_the_end_of_an_answer_is_the_tasks():
    assert in_characters(ModularTask()).end_token == EOS
    few = in_characters(FEW)
    assert few.tokenizer.decode([few.end_token]) == "\n"
    assert few.text([*few.tokenizer.encode("12"), few.end_token, PAD]) == "12"
    assert few.text(few.tokenizer.encode("123")) == "123"
    with pytest.raises(ValidationError, match="pairs of numbers of at least 0"):
        FewShotAdditionTask(examples=((1, -2),))


def test_only_the_whole_answer_is_rewarded():
    task = in_characters(ModularTask())
    answers = task.custom_prompts(["5+5="] * 5, ["10"] * 5).answers
    one, zero = task.tokenizer.encode("10")
    completions = [[one, zero, EOS], [one, EOS, PAD], [one, zero, zero], [zero, one, EOS], [EOS, PAD, PAD]]
    assert list(rewards(np.array(completions, np.int32), answers)) == [1, 0, 0, 0, 0]


def test_custom_prompts_use_the_tasks_characters():
    task = in_characters(ModularTask())
    prompts = task.custom_prompts(["1+2+3=", "4="], ["6", "4"])
    assert list(prompts.lengths) == [7, 3]
    assert prompts.answers.tolist() == [[9, EOS, PAD], [7, EOS, PAD]]
    with pytest.raises(InvalidInput, match="at most 3 tokens"):
        task.custom_prompts(["9="], ["999"])


def test_answers_must_not_change_the_tokens_of_prompts():
    class Merging(Tokenizer):
        def encode(self, text):
            return [99 if char == "M" else Tokenizer.encode(self, char)[0] for char in text.replace("=1", "M")]

    with pytest.raises(InvalidInput, match="those of '0\\+1=' and '1' are not"):
        TokenizedTask(ModularTask(), Merging(ModularTask().characters)).prompts()

    class NoLineBreak(Tokenizer):
        def encode(self, text):
            return Tokenizer.encode(self, text.replace("\n", "="))

    with pytest.raises(InvalidInput, match=r"'\\n' is not one of this tokenizer's"):
        _ = TokenizedTask(FEW, NoLineBreak(FEW.characters)).end_token


def test_the_most_tokens_of_a_completion():
    """The longest answer's by default; a larger number pads the answers, a smaller one is refused."""
    assert in_characters(ModularTask(modulus=11)).max_length == 3
    longer = in_characters(ModularTask(modulus=11, max_length=7))
    assert longer.max_length == longer.prompts().answers.shape[1] == 7
    assert longer.custom_prompts(["1+1="], ["123456"]).answers.shape == (1, 7)
    with pytest.raises(InvalidInput, match=r"at most 2 tokens with this task.*got 3 in '10'.*raise task.max_length"):
        in_characters(ModularTask(modulus=11, max_length=2)).prompts()
    with pytest.raises(InvalidInput, match=r"at most 7 tokens .* got 8 in '1234567'"):
        longer.custom_prompts(["1+1="], ["1234567"])


def test_prompts_are_within_the_policys_positions():
    task = in_characters(ModularTask(modulus=11))._replace(max_positions=10)
    assert task.prompts().tokens.shape[1] == 7
    with pytest.raises(InvalidInput, match=r"at most 10 tokens, the positions .* got 8 of the prompt '10\+100=' and up to 3"):
        task.custom_prompts(["1+1=", "10+100="], ["2", "0"])
    with pytest.raises(InvalidInput, match=r"got 7 of the prompt '10\+10=' and up to 4. .* lower task.max_length"):
        in_characters(ModularTask(modulus=11, max_length=4))._replace(max_positions=10).prompts()


def test_any_end_token_ends_an_answer():
    completions = np.array([[5, 9, 0], [5, 8, 0], [5, 7, 0], [5, 6, 9]], np.int32)
    answers = np.tile(np.array([5, 9, 0], np.int32), (4, 1))
    assert list(rewards(completions, answers, (9, 8))) == [1, 1, 0, 0]
    assert list(rewards(completions, answers, (9,))) == [1, 0, 0, 0]
