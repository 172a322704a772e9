"""From rows to prompts."""

import copy
import json
from decimal import Decimal

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import processors

from dapo_megatron.config import DataConfig
from dapo_megatron.data import prompts
from dapo_megatron.data.tokenizer import load_tokenizer
from dapo_megatron.errors import ConfigError, DapoError, DataError

OPTIONS = {"train": "unused", "prompt_field": "question", "template": "plain", "max_prompt_tokens": 1000}


def load_prompts(paths, tokenizer, limit=None, **changes):
    return prompts.load_prompts(paths, DataConfig(**OPTIONS | changes), tokenizer, limit=limit)


@pytest.fixture
def load(tmp_path, tokenizer):
    """Writes the records to a file and loads them with changed options."""

    def load(records, **changes):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return load_prompts(path, **{"tokenizer": tokenizer} | changes)

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
        ({"question": [{"content": "?"}], "answer": "1"}, "question", "{role, content}, found list"),
        ({"question": "?", "answer": ""}, "answer", "the answer is empty"),
        ({"question": "?", "answer": " \n"}, "answer", "the answer is empty"),
        ({"question": "?", "answer": None}, "answer", "expected text or a number, found NoneType None"),
        ({"question": "?", "answer": True}, "answer", "expected text or a number, found bool True"),
        ({"question": "?", "answer": {"value": "1"}}, "answer", "expected text or a number, found dict {"),
        ({"question": "?", "answer": []}, "answer", "expected at least one answer, found list []"),
        ({"question": "?", "answer": ["1", ["2"] * 99]}, "answer.1", "expected text or a number, found list ["),
        ({"question": "?", "answer": ["1", ""]}, "answer.1", "the answer is empty"),
        ({"question": [{"role": "user", "content": " "}], "answer": "1"}, "question", "found list [{'role'"),
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
        ({"answer_pattern": "(####|=) (.+)"}, "has 2 groups, exactly one is needed"),
        ({"answer_pattern": "1|#### (.+)"}, "line 1, field 'answer': the answer is empty"),
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
    loaded = load_prompts(path, tokenizer, **{"max_prompt_tokens": 20_000} | options)
    assert loaded.prompts and loaded.dropped == 0 and count in (None, len(loaded.prompts))
    assert len({prompt.id for prompt in loaded.prompts}) == len(loaded.prompts)
    assert all(prompt.ground_truth.lstrip("-")[0].isdecimal() for prompt in loaded.prompts)


def test_the_official_parquet_equals_our_dapo_template(shared, tokenizer):
    official = shared("aime/aime24_dapo_official.parquet")
    changes = {"answer_field": "reward_model.ground_truth", "max_prompt_tokens": 20_000}
    messages = load_prompts(official, tokenizer, **changes | {"prompt_field": "prompt"})
    text = load_prompts(official, tokenizer, **changes | {"prompt_field": "prompt.0.content"})
    raw = changes | {"prompt_field": "extra_info.raw_problem", "template": "dapo"}
    assert [p.input_ids for p in messages.prompts] == [p.input_ids for p in text.prompts]
    assert [p.input_ids for p in messages.prompts] == [
        p.input_ids for p in load_prompts(official, tokenizer, **raw).prompts
    ]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_real_tokenizers_agree_with_their_own_chat_template(name, shared, tmp_path):
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(shared(f"tokenizers/{name}"))
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "What is 1+1?", "answer": "2"}\n')
    prompt = load_prompts(path, real).prompts[0]
    message = [{"role": "user", "content": "What is 1+1?"}]
    assert prompt.input_ids == real.apply_chat_template(message, add_generation_prompt=True, return_dict=False)


def truths(loaded):
    return [(p.ground_truth, *p.alternatives) for p in loaded.prompts]


@pytest.mark.parametrize(
    "written, plain",
    [
        ("1e-05", "0.00001"),
        ("-2.50E-3", "-0.00250"),
        ("1e3", "1000"),
        ("0.1", "0.1"),
        ("2.0", "2.0"),
        ("0.30000000000000000001", "0.30000000000000000001"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("1e400", "1" + "0" * 400),
        ('"1e-05"', "1e-05"),
    ],
)
def test_a_number_is_the_plain_decimal_that_stands_in_the_file(written, plain, tmp_path, tokenizer):
    row = f'{{"question": "?", "answer": {written}}}'
    for name, text in (("data.jsonl", row), ("data.json", f"[{row}]")):
        (tmp_path / name).write_text(text)
        assert truths(load_prompts(tmp_path / name, tokenizer)) == [(plain,)]


@pytest.mark.parametrize("written", ["1e999999999", "1e-999999999", "1e99999999999999999999999", "9" * 1002])
def test_a_number_too_large_to_write_down(written, tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"question": "?", "answer": 1}}\n{{"question": "?", "answer": {written}}}\n')
    with pytest.raises(DataError, match="line 2, field 'answer': .*a number of more than 1000 digits"):
        load_prompts(path, tokenizer)


@pytest.mark.parametrize("kind", ["float32", "float64", "decimal128"])
def test_numbers_of_parquet_are_their_shortest_decimals(kind, tmp_path, tokenizer):
    numbers = [0.1, 1e-5, 72.0, 1e22] if kind != "decimal128" else [Decimal("0.10"), Decimal("1.25")]
    expected = ["0.1", "0.00001", "72.0", "1" + "0" * 22] if kind != "decimal128" else ["0.10", "1.25"]
    column = pyarrow.array(numbers, pyarrow.decimal128(5, 2) if kind == "decimal128" else getattr(pyarrow, kind)())
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["?"] * len(numbers), "answer": column}), path)
    assert truths(load_prompts(path, tokenizer)) == [(e,) for e in expected]


def test_float32_within_structs_and_lists_of_a_saved_dataset(tmp_path, tokenizer):
    features = datasets.Features(
        {"question": datasets.Value("string"), "a": {"b": datasets.List(datasets.Value("float32"))}}
    )
    rows = [{"question": "?", "a": {"b": [0.1, 0.7]}}, {"question": "?", "a": {"b": [1e-7]}}]
    datasets.Dataset.from_list(rows, features).select([1, 0]).save_to_disk(tmp_path / "saved")
    loaded = load_prompts(tmp_path / "saved", tokenizer, answer_field="a.b")
    assert truths(loaded) == [("0.0000001",), ("0.1", "0.7")]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_finite_number_is_refused(number, tmp_path, tokenizer):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["?", "?"], "answer": [1.0, number]}), path)
    with pytest.raises(DataError, match=r"data.parquet, row 2, field 'answer': .*not a finite number"):
        load_prompts(path, tokenizer)


def test_any_of_several_answers_is_right(load):
    records = [{"question": "?", "answer": [" 1/2 ", 0.5, "0.5"]}, {"question": "?", "answer": ["3"]}]
    assert truths(load(records)) == [("1/2", "0.5"), ("3",)]
    records = [{"question": "?", "answer": ["so #### 1", "so #### 2"]}]
    assert truths(load(records, answer_pattern="#### (.+)")) == [("1", "2")]
    records[0]["answer"][1] = "none"
    with pytest.raises(DataError, match="line 1, field 'answer.1': nothing matches data.answer_pattern"):
        load(records, answer_pattern="#### (.+)")


ASKED = [{"role": "user", "content": "1+1?"}]


def test_a_last_message_of_the_assistant_is_continued(load, tokenizer):
    prompt = load([{"question": [*ASKED, {"role": "assistant", "content": "It is "}], "answer": "2"}]).prompts[0]
    assert tokenizer.decode(prompt.input_ids) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\nIt is "
    assert prompt.text == "1+1?"


def test_of_several_turns_the_last_question_is_what_is_asked(load, tokenizer):
    turns = [*ASKED, {"role": "assistant", "content": "2"}, {"role": "user", "content": "And 1+2?"}]
    assert load([{"question": turns, "answer": "3"}]).prompts[0].text == "And 1+2?"


def test_a_template_may_trim_what_is_said_and_leave_out_earlier_thoughts(load, tokenizer, monkeypatch):
    """As Llama 3's and Qwen3's do."""
    said = "{{ (m.content.split('</think>')[-1] if m.role == 'assistant' else m.content) | trim }};"
    monkeypatch.setattr(tokenizer, "chat_template", f"{{% for m in messages %}}{said}{{% endfor %}}")
    turns = [{"role": "user", "content": " 1+1? "}, {"role": "assistant", "content": "<think>1, 2</think>2"}, *ASKED]
    prompt = load([{"question": turns, "answer": "2"}]).prompts[0]
    assert tokenizer.decode(prompt.input_ids) == "1+1?;2;1+1?;"


def test_system_prompt(load, tokenizer):
    for question in (ASKED, "1+1?"):
        prompt = load([{"question": question, "answer": "2"}], system_prompt="Be brief.").prompts[0]
        text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(prompt.input_ids) == text and prompt.text == "1+1?"
    own = {"role": "system", "content": "Think."}
    for messages in ([own, *ASKED], [*ASKED, own]):
        with pytest.raises(DataError, match="line 2, field 'question': .* unset data.system_prompt"):
            load([GOOD, {"question": messages, "answer": "2"}], system_prompt="Be brief.")


def test_variables_of_the_chat_template(load, tokenizer, monkeypatch):
    template = tokenizer.chat_template + "{% if enable_thinking is false %}<think></think>{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    ends = [
        tokenizer.decode(load([GOOD], chat_template_kwargs=variables).prompts[0].input_ids)
        for variables in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    ]
    assert [end.endswith("<think></think>") for end in ends] == [False, False, True]
    for variables, message in [
        ({"enable_thinkng": False}, "reads no 'enable_thinkng', did you mean 'enable_thinking'"),
        ({"add_generation_prompt": False}, "'add_generation_prompt' is not for the config to set"),
        ({"messages": []}, "'messages' is not for the config to set"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load([GOOD], chat_template_kwargs=variables)


@pytest.mark.parametrize("changes", [{"system_prompt": "Be brief."}, {"chat_template_kwargs": {"role": 1}}])
def test_options_of_chat_templates_need_one(changes, load, tokenizer, monkeypatch):
    with pytest.raises(ConfigError, match="need data.chat=true"):
        load([GOOD], chat=False, **changes)
    assert load([{"question": ASKED, "answer": "2"}], chat=False, **changes).prompts
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="has no chat template"):
        load([GOOD], **changes)


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('roles must\\nalternate') }}", "roles must alternate"),
        ("{{ messages[0].absent.deeper }}", "has no attribute 'absent'"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{% if %}", "Expected an expression"),
        ("{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}", "out the message of role 'user'"),
    ],
)
def test_a_chat_template_that_fails_is_one_line_with_the_row(template, reason, load, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(DataError) as caught:
        load([{"question": ASKED, "answer": "2"}])
    text = str(caught.value)
    assert "data.jsonl, line 1, field 'question'" in text and reason in text and "\n" not in text


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_a_role_that_a_real_template_leaves_out_silently(name, shared, tmp_path):
    real = load_tokenizer(str(shared(f"tokenizers/{name}")))
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": [{"role": "human", "content": "What is 1+1?"}], "answer": "2"}\n')
    with pytest.raises(DataError, match="line 1, .*leaves out the message of role 'human'"):
        load_prompts(path, real)


def test_qwen3_without_thinking(shared, tmp_path):
    real = load_tokenizer(str(shared("tokenizers/qwen3")))
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "What is 1+1?", "answer": "2"}\n')
    prompt = load_prompts(path, real, chat_template_kwargs={"enable_thinking": False}).prompts[0]
    assert real.decode(prompt.input_ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not real.decode(load_prompts(path, real).prompts[0].input_ids).endswith("</think>\n\n")


def test_a_folder_without_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"model.path={tmp_path}: no readable tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_code_in_a_models_folder_is_not_run(tmp_path):
    names = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own"} | names))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    with pytest.raises(ConfigError, match="no readable tokenizer"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_longest_and_progress(load, tmp_path, tokenizer):
    records = [{"question": "?" * length, "answer": "1"} for length in (10, 60, 20)]
    assert load(records, chat=False, max_prompt_tokens=20).longest == 60
    seen = []
    data = DataConfig(**OPTIONS)
    prompts.load_prompts(tmp_path / "data.jsonl", data, tokenizer, progress=lambda *a: seen.append(a))
    assert seen == [(1, 3), (2, 3), (3, 3)]
