"""The Modelfile's Go template gives the prompts of the Jinja template, or is refused."""

import json
import shutil
import subprocess

import pytest

from qlora.data import chat
from qlora.exporter.gguf import ollama, vocabulary
from qlora.system.errors import InputError
from tests.conftest import CHATML, messages
from tests.data.families import BY_NAME, FAMILIES

ONE = [("user", "What is 3 plus 4?")]
THREE = [*ONE, ("assistant", "7."), ("user", "And 5\nplus 6?")]
SYSTEM = ("system", "Answer in\none word.")


def made(tokenizer, adds_bos=None):
    """Return (the Modelfile, its Go template)."""
    adds_bos = vocabulary.adds_bos(tokenizer) if adds_bos is None else adds_bos
    text = ollama.modelfile(tokenizer, "model.gguf", chat.stop_token_ids(tokenizer), adds_bos)
    return text, text.split('TEMPLATE """')[1].split('"""')[0]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_real_templates_give_the_same_prompts_in_ollama(family):
    tokenizer = family.tokenizer()
    _, template = made(tokenizer)
    bos = family.bos if family.leading_bos else ""
    for turns in [ONE, THREE, *([[SYSTEM, *ONE], [SYSTEM, *THREE]] if family.system else [])]:
        found = ollama.render(template, messages(turns))
        assert bos + found == chat.render(tokenizer, messages(turns), True)
        assert not bos or bos not in found  # llama.cpp puts it there, once
        assert ollama.render(template.replace("user", "User"), messages(turns)) != found


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_the_stop_token_of_every_family_is_named(family):
    assert f'PARAMETER stop "{family.end}"\n' in made(family.tokenizer())[0]


def test_a_modelfile_as_a_person_would_write_it(tokenizer):
    text, _ = made(tokenizer)
    assert text == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ $first := true }}{{ range $i, $m := .Messages }}{{ if eq .Role "user" }}{{ if $first }}'
        "{{ if $.System }}<|im_start|>system\n{{ $.System }}<|im_end|>\n<|im_start|>user\n"
        "{{ else }}<|im_start|>user\n{{ end }}"
        "{{ else }}<|im_end|>\n<|im_start|>user\n{{ end }}{{ .Content }}"
        "{{ if eq (len (slice $.Messages $i)) 1 }}<|im_end|>\n<|im_start|>assistant\n{{ end }}{{ $first = false }}"
        '{{ else if eq .Role "assistant" }}<|im_end|>\n<|im_start|>assistant\n{{ .Content }}{{ end }}{{ end }}"""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


def test_the_default_system_text_of_smollm2_gives_way_to_one_that_is_given():
    _, template = made(BY_NAME["smollm2"].tokenizer())
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert ollama.render(template, messages(ONE)).count(default) == 1
    assert default not in ollama.render(template, messages([SYSTEM, *ONE]))


def test_an_answer_that_comes_last_is_left_open():
    _, template = made(BY_NAME["qwen2.5"].tokenizer())
    assert ollama.render(template, messages(THREE[:2])).endswith("<|im_end|>\n<|im_start|>assistant\n7.")


def test_the_start_token_stays_in_the_template_where_llama_cpp_adds_none():
    tokenizer = BY_NAME["llama-3.1"].tokenizer()
    _, template = made(tokenizer, adds_bos=False)
    assert ollama.render(template, messages(THREE)) == chat.render(tokenizer, messages(THREE), True)


def test_a_start_token_that_training_never_saw_is_refused(tokenizer):
    with pytest.raises(InputError, match="and so the training, does not have it"):
        made(tokenizer, adds_bos=True)


def test_what_the_go_template_cannot_do_is_said():
    assert "has no system role" in made(BY_NAME["gemma-2"].tokenizer())[0]
    assert "white space around messages of user, assistant" in made(BY_NAME["gemma-2"].tokenizer())[0]
    assert made(BY_NAME["smollm2"].tokenizer())[0].startswith("FROM")  # nothing to say


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            CHATML.replace("{{ message['role'] }}", "{{ message['role'] }} {{ loop.index }}"),
            "first conversation that differs",
        ),
        (
            CHATML.replace("{{ message['content'] }}", "{{ message['content'] | upper }}"),
            "first conversation that differs",
        ),
        (CHATML.replace("{{ message['content'] }}", "{{ message['content'] | replace('7', 'seven') }}"), "seven"),
        ("{% set messages = messages[-1:] %}" + CHATML, "shows only U2"),
        (CHATML + '"""', "a Modelfile cannot hold"),
    ],
    ids=["counts turns", "upper case", "replaces words", "last turn alone", "quotes"],
)
def test_a_template_that_is_not_fixed_strings_between_turns_is_refused(tokenizer, template, why):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=why):
        made(tokenizer)


@pytest.mark.parametrize("border", ["{", "{{", "}}", "a {{ b }} {", "{{{"])
def test_braces_of_a_chat_template_stay_braces(tokenizer, border):
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "{{ '" + border + "' }}<|im_end|>").replace(
        "assistant\n{%", "assistant\n{{ '" + border + "' }}{%"
    )
    _, template = made(tokenizer)
    assert ollama.render(template, messages(THREE)) == chat.render(tokenizer, messages(THREE), True)


GO = """
package main
import ("encoding/json"; "os"; "strings"; "text/template")
type Message struct { Role, Content string }
type Case struct { Template, System string; Messages []*Message }
func main() {
    var cases []Case
    if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
    out := []string{}
    for _, c := range cases {
        var b strings.Builder
        t := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
        values := map[string]any{"System": c.System, "Messages": c.Messages, "Response": ""}
        if err := t.Execute(&b, values); err != nil { panic(err) }
        out = append(out, b.String())
    }
    json.NewEncoder(os.Stdout).Encode(out)
}
"""


@pytest.mark.skipif(
    shutil.which("go") is None, reason="no Go; the evaluator in qlora/exporter/ollama.py stands in for it"
)
def test_go_itself_gives_the_same_prompts(tmp_path):
    cases, expected = [], []
    for family in FAMILIES:
        tokenizer = family.tokenizer()
        _, template = made(tokenizer)
        for turns in ollama.conversations(family.system):
            system = "".join(text for role, text in turns if role == "system")
            cases.append({"Template": template, "System": system,
                          "Messages": [{"Role": role, "Content": text} for role, text in turns]})  # fmt: skip
            text = chat.render(tokenizer, messages(turns), True)
            expected.append(text.removeprefix(family.bos) if family.leading_bos else text)
    (tmp_path / "main.go").write_text(GO)
    done = subprocess.run(
        ["go", "run", str(tmp_path / "main.go")],
        input=json.dumps(cases),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    assert json.loads(done.stdout) == expected
