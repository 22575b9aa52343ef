"""Text to ids and back over real tokenizers: A7, A8, A9, A12, A13."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reasoner.data.codec import CLOSE, OPEN, Codec
from reasoner.errors import DataError

Making = Callable[..., Any]
TOKENIZERS = ["qwen2.5-instruct", "llama-3.2-instruct-hf", "smollm2-135m-instruct", "gpt2", "minimind"]
TOKENIZERS += ["phi-1.5", "pythia-gpt-neox"]


@pytest.fixture(params=[f"tokenizers/{name}" for name in TOKENIZERS] + ["models/TinyStories-656K"])
def codec(request: pytest.FixtureRequest, real: Making) -> Codec:
    return Codec(real(request.param))


def turn(codec: Codec, content: str) -> str:
    """Content between control tokens of this tokenizer, as a template would put it."""
    first, last = next(iter(codec.special)), list(codec.special)[-1]
    return f"{first}user\n{content}{last}\nassistant\n"


def num_special(codec: Codec, ids: tuple[int, ...]) -> int:
    return sum(number in ids and ids.count(number) for number, _ in codec.special.values())


def test_ordinary_text_gets_the_tokenizers_own_ids(codec: Codec, shared: Path) -> None:
    lines = (shared / "gsm8k/test.jsonl").read_text().splitlines()[:40]
    for line in lines:
        row = json.loads(line)
        text = turn(codec, codec.guard(row["question"] + row["answer"]))
        assert codec.encode(text) == tuple(codec.tokenizer.encode(text, add_special_tokens=False))


def test_a13_marks_change_no_seam(codec: Codec) -> None:
    """The way of marked texts gives ordinary text the same ids: nothing is cut where a mark or a control token was."""
    for content in ("2 + 2 = 4", " spaced ", "\n\nnew lines\n", "ends in 4", "", "é½²"):
        text = turn(codec, content)
        ids = codec._encode_marked(text)
        if codec.tokenizer.decode(codec.encode("a b")) == codec.tokenizer.decode(codec.encode(" a b")):
            # Sentencepiece puts a space before each piece that is encoded alone.
            assert codec.decode(ids).replace(" ", "") == codec.decode(codec.encode(text)).replace(" ", "")
        else:
            assert ids == codec.encode(text)


def test_a13_a_row_writes_no_control_token(codec: Codec) -> None:
    frame = num_special(codec, codec.encode(turn(codec, "hi")))
    for control in list(codec.special)[:3] + list(codec.special)[-1:]:
        row = f"hi{control}\n{control}there {control}"
        assert num_special(codec, codec.encode(turn(codec, row))) == frame + 3  # the trap
        ids = codec.encode(turn(codec, codec.guard(row)))
        assert num_special(codec, ids) == frame
        assert codec.unguard(codec.guard(row)) == row
        if codec.tokenizer.name_or_path.endswith("TinyStories-656K"):
            continue  # its vocabulary can't say `|`
        assert codec.decode(ids).replace(" ", "") == turn(codec, row).replace(" ", "")


def test_a13_split_equals_what_the_tokenizer_says_of_the_content_alone(real: Making) -> None:
    tokenizer = real("tokenizers/qwen2.5-instruct")
    codec = Codec(tokenizer)
    row = "hi<|im_end|>"
    ids = codec.encode(f"<|im_start|>{codec.guard(row)}<|im_end|>")
    assert ids[1:-1] == tuple(tokenizer.encode(row, add_special_tokens=False, split_special_tokens=True))
    assert (ids[0], ids[-1]) == (151644, 151645) and 151645 not in ids[1:-1]
    assert codec.encode("hi") == tuple(tokenizer.encode("hi"))  # splitting leaves no state behind


def test_a13_a_row_can_not_forge_the_marks(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="U\\+FDD0"):
        Codec(tokenizer).guard(f"a{OPEN}b")
    with pytest.raises(DataError, match="U\\+FDD0"):
        Codec(tokenizer).guard(f"<|im_end|>{CLOSE}")


def test_a13_reasoning_tags_of_a_row_stay_tokens(making: Making) -> None:
    tokenizer = making(think=True)
    codec = Codec(tokenizer)
    think, end_think, im_end = (tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "</think>", "<|im_end|>"))
    ids = codec.encode(codec.guard("<think>a<|im_end|></think>4"))
    assert ids[0] == think and end_think in ids and im_end not in ids


def test_added_tokens_that_swallow_spaces_still_do(making: Making) -> None:
    from tokenizers import AddedToken

    tokenizer = making()
    extra = [AddedToken("<|user|>", special=True, rstrip=True), AddedToken("<|end|>", special=True, lstrip=True)]
    tokenizer.add_tokens(extra, special_tokens=True)
    codec = Codec(tokenizer)
    assert codec._encode_marked("<|user|>\n\nhi \n<|end|> a") == codec.encode("<|user|>\n\nhi \n<|end|> a")
    assert codec.decode(codec.encode(f"<|user|> {codec.guard('<|end|>')}")) == "<|user|><|end|>"


def test_a7_gpt2_ids_decode_to_text_that_encodes_to_others(real: Making) -> None:
    """Why ids are the truth: decoding is right, encoding again would not be."""
    codec = Codec(real("tokenizers/gpt2"))
    assert codec.encode(codec.decode([256, 258])) == (262,)


def test_a9_decode_keeps_special_tokens_and_spaces(making: Making, real: Making) -> None:
    codec = Codec(making(think=True))
    text = "<think>a , b</think> 4 .<|im_end|>"
    assert codec.decode(codec.encode(text)) == text
    eager = making()  # tidies spaces away unless it is told not to
    eager.clean_up_tokenization_spaces = True
    eager.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    assert eager.decode(eager.encode("Yes , 4 .")) == "Yes, 4."
    assert Codec(eager).decode(eager.encode("Yes , 4 .")) == "Yes , 4 ."
    phi = Codec(real("tokenizers/phi-1.5"))  # its tokenizer_config asks to tidy spaces away
    assert phi.decode(phi.encode("Yes , it 's 4 .")) == "Yes , it 's 4 ."


def test_a12_characters_that_a_tokenizer_loses(real: Making) -> None:
    tiny = Codec(real("models/TinyStories-656K"))
    assert {"/", "=", "#"} <= tiny.lost("12/4 = 3\n#### 3")
    assert tiny.lost("12 is three") == set()


@pytest.mark.parametrize("name", ["qwen2.5-instruct", "smollm2-135m-instruct", "gpt2", "llama-3.2-instruct-hf"])
def test_a12_byte_level_tokenizers_lose_nothing(real: Making, name: str) -> None:
    codec = Codec(real(f"tokenizers/{name}"))
    for text in ("12/4 = 3\n#### 3 \\boxed{½} ^%°", "e\u0301 é", "中文 😀 \u200b\ufffd"):
        assert codec.lost(text) == set()


def test_many_texts_are_encoded_as_each_alone(tokenizer: Any) -> None:
    codec = Codec(tokenizer)
    texts = ["a", "", codec.guard("x<|im_end|>"), "<|im_end|>42", "\n\n"]
    assert codec.encode_all(texts) == [codec.encode(text) for text in texts]
    assert codec.encode_all([]) == []


def test_begins_with_bos(making: Making, real: Making) -> None:
    assert Codec(making(add_bos=True)).begins_with_bos()
    assert not Codec(making()).begins_with_bos()
    assert Codec(real("models/TinyStories-656K")).begins_with_bos()
    assert not Codec(real("tokenizers/qwen2.5-instruct")).begins_with_bos()
