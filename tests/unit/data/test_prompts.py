"""From rows to prompts."""

import copy
import json

import pytest
from tokenizers import processors

from dapo_megatron.data.prompts import load_prompts
from dapo_megatron.errors import DapoError

OPTIONS = {
    "prompt_field": "question",
    "answer_field": "answer",
    "template": "plain",
    "max_prompt_tokens": 1000,
    "too_long": "drop",
}


@pytest.fixture
def load(tmp_path, tokenizer):
    """Writes the records to a file and loads them with changed options."""

    def load(records, **changes):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return load_prompts(path, **({"tokenizer": tokenizer} | OPTIONS | changes))

    return load


def test_a_prompt(load, tokenizer):
    loaded = load([{"question": "1+1?", "answer": 2}, {"question": "1+2?", "answer": " 3 "}])
    assert loaded.dropped == 0
    assert [p.id for p in loaded.prompts] == ["data.jsonl:0", "data.jsonl:1"]
    assert [p.row for p in loaded.prompts] == [0, 1]
    assert [p.text for p in loaded.prompts] == ["1+1?", "1+2?"]
    assert [p.ground_truth for p in loaded.prompts] == ["2", "3"]
    assert tokenizer.decode(loaded.prompts[0].input_ids) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.prompts[0].input_ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_without_chat_template_the_text_is_tokenised_as_it_is(load, tokenizer):
    prompt = load([{"question": "{a} 1+1=", "answer": "2"}], chat=False, template="Q: {prompt}{b}").prompts[0]
    assert tokenizer.decode(prompt.input_ids) == "Q: {a} 1+1={b}"


def test_special_tokens_of_the_tokenizer_come_once(load, tokenizer):
    begins = copy.deepcopy(tokenizer)
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|endoftext|> $A", None, [("<|endoftext|>", 0)]
    )
    records = [{"question": "1+1=", "answer": "2"}]
    plain = load(records, chat=False, tokenizer=begins).prompts[0]
    assert begins.decode(plain.input_ids) == "<|endoftext|>1+1="
    assert load(records, tokenizer=begins).prompts == load(records).prompts, "chat templates write their own"


def test_messages_go_through_the_chat_template_without_the_prompt_template(load, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    prompt = load([{"question": messages, "answer": "2"}], template="dapo", chat=False).prompts[0]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt.input_ids) == text
    assert prompt.text == "1+1?"


@pytest.mark.parametrize(
    "template, beginning, end",
    [
        ("dapo", "Solve the following math problem step by step.", 'its own line after "Answer:".'),
        ("boxed", "1+1?\n\nPlease", "final answer within \\boxed{}."),
        ("plain", "1+1?", "1+1?"),
    ],
)
def test_ready_templates(load, tokenizer, template, beginning, end):
    prompt = load([{"question": "1+1?", "answer": "2"}], template=template, chat=False).prompts[0]
    text = tokenizer.decode(prompt.input_ids)
    assert text.startswith(beginning) and text.endswith(end) and text.count("1+1?") == 1


def test_answer_pattern(load):
    records = [{"question": "?", "answer": "1 + 1\n#### 1,002"}]
    assert load(records, answer_pattern=r"#### (.+)").prompts[0].ground_truth == "1,002"


def test_too_long_prompts_are_dropped_and_counted_or_an_error(load):
    records = [{"question": "?" * length, "answer": "1"} for length in (10, 60, 20, 61)]
    options = {"chat": False, "max_prompt_tokens": 59}
    loaded = load(records, **options)
    assert [p.row for p in loaded.prompts] == [0, 2] and loaded.dropped == 2
    assert load(records, **options | {"max_prompt_tokens": 60}).dropped == 1
    with pytest.raises(DapoError, match=r"data.jsonl, line 2: the prompt has 60 tokens, more than .*=59"):
        load(records, **options, too_long="error")
    with pytest.raises(DapoError, match="each of the 4 prompts is longer than data.max_prompt_tokens=5"):
        load(records, **options | {"max_prompt_tokens": 5})


def test_limit_reads_the_first_rows(load):
    records = [{"question": str(i), "answer": "1"} for i in range(5)] + [{"bad": "row"}]
    assert [p.text for p in load(records, limit=2).prompts] == ["0", "1"]


GOOD = {"question": "?", "answer": "1"}


@pytest.mark.parametrize(
    "bad, field, message",
    [
        ({"qestion": "?", "answer": "1"}, "question", "did you mean 'qestion'?"),
        ({"question": "?", "anser": "1"}, "answer", "did you mean 'anser'?"),
        ({"question": 3, "answer": "1"}, "question", "expected text or a list of chat messages"),
        ({"question": "", "answer": "1"}, "question", "found str ''"),
        ({"question": [], "answer": "1"}, "question", "found list []"),
        ({"question": [{"role": "user"}], "answer": "1"}, "question", "{role, content}, found list"),
        ({"question": "?", "answer": ""}, "answer", "the answer is empty"),
        ({"question": "?", "answer": " \n"}, "answer", "the answer is empty"),
        ({"question": "?", "answer": None}, "answer", "expected text or a number, found NoneType None"),
        ({"question": "?", "answer": True}, "answer", "expected text or a number, found bool True"),
        ({"question": "?", "answer": ["1"] * 99}, "answer", "expected text or a number, found list ["),
    ],
)
def test_a_bad_row_names_file_line_and_field(load, bad, field, message):
    with pytest.raises(DapoError) as caught:
        load([GOOD, bad, GOOD])
    text = str(caught.value)
    assert "data.jsonl, line 2" in text and repr(field) in text and message in text and "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"template": "dopa"}, "unknown template 'dopa', did you mean 'dapo'"),
        ({"answer_pattern": "("}, "is not a regular expression"),
        ({"answer_pattern": "#### .+"}, "has 0 groups, exactly one is needed"),
        ({"answer_pattern": "#### (.+)"}, "line 1, field 'answer': nothing matches data.answer_pattern"),
    ],
)
def test_bad_options(load, changes, message):
    with pytest.raises(DapoError) as caught:
        load([GOOD], **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_without_chat_template(load, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DapoError, match="has no chat template: use a chat model, or set data.chat=false"):
        load([GOOD])
    assert load([GOOD], chat=False).prompts


@pytest.mark.parametrize(
    "name, options, count",
    [
        (
            "aime/aime24_dapo_official.parquet",
            {"prompt_field": "prompt", "answer_field": "reward_model.ground_truth"},
            None,
        ),
        ("aime/aime25.jsonl", {"prompt_field": "problem", "template": "dapo"}, 30),
        ("gsm8k/test.jsonl", {"answer_pattern": "#### (.+)"}, 1319),
        (
            "dapo/dapo_math_17k_dedup.jsonl",
            {"prompt_field": "problem", "template": "dapo", "limit": 2000},
            2000,
        ),
    ],
)
def test_real_data(name, options, count, shared, tokenizer):
    path = shared(name)
    loaded = load_prompts(path, tokenizer=tokenizer, **OPTIONS | {"max_prompt_tokens": 20_000} | options)
    assert loaded.prompts and loaded.dropped == 0 and count in (None, len(loaded.prompts))
    assert len({prompt.id for prompt in loaded.prompts}) == len(loaded.prompts)
    assert all(prompt.ground_truth.lstrip("-")[0].isdecimal() for prompt in loaded.prompts)


def test_the_official_parquet_equals_our_dapo_template(shared, tokenizer):
    official = shared("aime/aime24_dapo_official.parquet")
    changes = OPTIONS | {"answer_field": "reward_model.ground_truth", "max_prompt_tokens": 20_000}
    messages = load_prompts(official, tokenizer=tokenizer, **changes | {"prompt_field": "prompt"})
    text = load_prompts(official, tokenizer=tokenizer, **changes | {"prompt_field": "prompt.0.content"})
    raw = changes | {"prompt_field": "extra_info.raw_problem", "template": "dapo"}
    assert [p.input_ids for p in messages.prompts] == [p.input_ids for p in text.prompts]
    assert [p.input_ids for p in messages.prompts] == [
        p.input_ids for p in load_prompts(official, tokenizer=tokenizer, **raw).prompts
    ]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_real_tokenizers_agree_with_their_own_chat_template(name, shared, tmp_path):
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(shared(f"tokenizers/{name}"))
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "What is 1+1?", "answer": "2"}\n')
    prompt = load_prompts(path, tokenizer=real, **OPTIONS).prompts[0]
    message = [{"role": "user", "content": "What is 1+1?"}]
    assert prompt.input_ids == real.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
