"""to=ollama: the Modelfile says what the run said, and its template writes what the run's own wrote."""

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from reasoner.__main__ import main
from reasoner.chat import open_model
from reasoner.data.templates import CHATML, ChatTemplate, PlainTemplate
from reasoner.errors import ModelError
from reasoner.export import llama, ollama
from tests.export.test_gguf import told

DATA = Path(__file__).parents[2] / "../shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data folder is not there")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set top = messages[0]['content'] + '\n\n' %}"
    "{% set talk = messages[1:] %}{% else %}{% set top = '' %}{% set talk = messages %}{% endif %}{% for m in talk %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ top if loop.first else '' }}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
FORGETS = (  # only the last turn gets its mark: no Go template of ours can say it
    "{% for m in messages %}{{ '!!' if loop.last else '' }}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def chat(source: str, *, bos: bool = True) -> ChatTemplate:
    return ChatTemplate(tokenizer(bos=bos), source, name="template", date="26 Jul 2024", add_bos=False)


GOLD = {
    "llama3": (
        LLAMA3,
        '{{ if eq .Role "system" }}<|start_header_id|>system<|end_header_id|>\n\n{{ .Content }}<|eot_id|>',
    ),
    "gemma": (GEMMA, "{{ if or (ne $i 1) (not $.System) }}<start_of_turn>user\n{{ end }}{{ .Content }}<end_of_turn>\n"),
    "mistral": (MISTRAL, '{{ if eq .Role "user" }}[INST] {{ .Content }} [/INST]{{ else if eq .Role "assistant" }}'),
    "phi": (PHI, '{{ else if eq .Role "user" }}<|user|>\n{{ .Content }}<|end|>\n{{ else if'),
    "default": (DEFAULT, "{{ if not .System }}<|im_start|>system\nYou help.<|im_end|>\n{{ end }}{{ range"),
    "chatml": (CHATML.read_text(), "{{ .Content }}<|im_end|>\n{{ end }}{{ end }}<|im_start|>assistant\n"),
}


@pytest.mark.parametrize("name", GOLD)
def test_known_templates_become_ollama_s(name: str):
    source, part = GOLD[name]
    go = ollama.template_of(chat(source))
    assert part in go and "<s>" not in go, "llama.cpp puts the BOS there by itself"
    if name in ("llama3", "gemma"):
        assert ollama.template_of(chat(source, bos=False)).count("<s>") == 2, "with and without a system text"


@needs_data
def test_real_templates_become_ollama_s():
    names = ("qwen2_5", "qwen3", "llama3", "llama3_1", "llama3_2", "gemma", "gemma3", "phi3", "phi3_5")
    real = AutoTokenizer.from_pretrained(DATA / "tokenizers/minimind")
    for name in names:
        source = (DATA / f"chat_templates/{name}.jinja").read_text()
        template = ChatTemplate(real, source, name=name, date="26 Jul 2024", add_bos=False)
        assert "{{ range $i, $m := .Messages }}" in ollama.template_of(template), name


def test_the_template_of_a_talk_is_read_as_go_reads_it():
    go = (
        '{{ if not .System }}<none>{{ end }}{{ range $i, $m := .Messages }}{{ if eq .Role "system" }}S:{{ .Content }};'
        '{{ else if eq .Role "user" }}{{ if or (ne $i 1) (not $.System) }}U:{{ end }}{{ .Content }};'
        '{{ else if eq .Role "assistant" }}A:{{ .Content }};{{ end }}{{ end }}A:'
    )
    talk = [{"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "ho"), ("user", "so"))]
    assert ollama.render(go, talk) == "<none>U:hi;A:ho;U:so;A:"
    assert ollama.render(go, [{"role": "system", "content": "be"}, *talk]) == "S:be;hi;A:ho;U:so;A:"
    assert ollama.render(ollama.PROMPT, talk[:1]) == "hi"


def test_a_template_that_go_can_not_say_is_refused_and_a_plain_one_is_the_prompt():
    with pytest.raises(ModelError, match="can't say what the template writes: export to=gguf"):
        ollama.template_of(chat(FORGETS))
    assert ollama.template_of(PlainTemplate(tokenizer(bos=False))) == "{{ .Prompt }}"


def parsed(path: Path) -> dict[str, list[str]]:
    """A Modelfile's instructions in order, values unquoted."""
    pattern = r'^(FROM|TEMPLATE|SYSTEM|PARAMETER \w+) (?:"""(.*?)"""|"(.*?)"|(\S+))$'
    found: dict[str, list[str]] = {}
    text = path.read_text()
    for name, *values in re.findall(pattern, text, re.M | re.S):
        found.setdefault(name, []).append(next(value for value in values if value))
    assert re.sub(pattern, "", text, flags=re.M | re.S).strip() == ""
    return found


@pytest.mark.skipif(not llama.installed(), reason="no llama-cpp-python: make test builds it")
def test_a_run_becomes_a_folder_for_ollama(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "out"
    asked = ["export", f"run={trained_run}", "to=ollama", "quant=q8_0", "problems=20", f"out={out}"]
    assert main(asked) == 0
    assert f"next: ollama create NAME -f {out / 'Modelfile'}" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "export.json", "model-q8_0.gguf"]
    assert told(out)["passed"] and told(out)["loader"] == "llama.cpp"
    said = parsed(out / "Modelfile")
    assert said["FROM"] == ["./model-q8_0.gguf"] and said["TEMPLATE"] == ["{{ .Prompt }}"]
    assert said["PARAMETER stop"] == ["<eos>"] and said["PARAMETER temperature"] == ["1.0"]
    assert said["PARAMETER num_ctx"] == ["256"] and "SYSTEM" not in said


def test_a_system_text_is_in_the_modelfile(trained_run: Path, tmp_path: Path):
    config = open_model(trained_run, None, []).config
    given = {"system": "Think.\nThen answer.", "context": 32_768}
    (tmp_path / "Modelfile").write_text(ollama.modelfile("m.gguf", config, "{{ .Prompt }}", ["<a>", "<b>"], **given))
    said = parsed(tmp_path / "Modelfile")
    assert said["SYSTEM"] == ["Think.\nThen answer."] and said["PARAMETER stop"] == ["<a>", "<b>"]
    assert said["PARAMETER num_ctx"] == ["4096"]
    with pytest.raises(ModelError, match="which a Modelfile can't"):
        ollama.modelfile("m.gguf", config, "", [], system='a """ b', context=1)
