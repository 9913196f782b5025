"""`slm generate` with a file of prompts, and chat: what they write, what they go on from, what they refuse."""

import io
import json
import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slm import SLMForCausalLM, SLMTokenizer
from slm.chat import Chat, OneTurn, _compiled, find_template
from slm.cli import main
from slm.completion import continuations, encode_prompts
from slm.errors import UserError
from slm.prompts import answer, read_prompts

PROMPTS = ["the fox", "a", "a rather longer prompt than the others", "end", "äöü"]
SHORT_LINES = Path(__file__).parents[2] / "constraints.txt"
GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def tokenizer():
    return SLMTokenizer()


@pytest.fixture(scope="module")
def model(tiny_config, tokenizer):
    varied = {"initializer_range": 0.2, "tie_word_embeddings": False, "vocab_size": len(tokenizer)}
    return SLMForCausalLM(tiny_config.model_copy(update=varied), seed=1)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path, tokenizer)
    return path


def run_slm(*arguments):
    """The command in this process; its exit code."""
    sys.argv = ["slm", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- a file of prompts --------------------------------------------------------------------------------------


def test_each_prompt_of_a_file_gets_the_answer_it_gets_alone(model, tokenizer, tmp_path):
    """Greedy, in batches of two of different lengths; other fields of a line are kept."""
    file, output = tmp_path / "p.jsonl", tmp_path / "deep" / "a.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text, "id": n}) for n, text in enumerate(PROMPTS)))
    assert answer(model, tokenizer, read_prompts(file), output, batch=2, about={}, **GREEDY)[0] == len(PROMPTS)
    for n, (line, text) in enumerate(zip(lines_of(output), PROMPTS, strict=True)):
        [alone] = continuations(model, tokenizer, encode_prompts(tokenizer, [text]), **GREEDY)
        assert (line["id"], line["prompt"], line["completion"]) == (n, text, alone.text)
        assert (line["num_tokens"], line["finished"]) == (alone.num_tokens, alone.finished)


def test_a_killed_file_goes_on_and_is_the_same(model, tokenizer, tmp_path):
    """Cut anywhere: within a line, within a batch, at its end, whole. Sampled, so that a batch done half would differ."""
    prompts = read_prompts(_written(tmp_path))
    options = {"batch": 2, "about": {"model": "m"}, "max_new_tokens": 8, "seed": 3}
    whole = tmp_path / "whole.jsonl"
    answer(model, tokenizer, prompts, whole, **options)
    data = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut, done in [(0, 0), (5, 0), (ends[0], 0), (ends[1], 2), (ends[2] + 3, 2), (ends[3], 4), (len(data), 5)]:
        again = tmp_path / f"{cut}.jsonl"
        again.write_bytes(data[:cut])
        assert answer(model, tokenizer, prompts, again, **options)[0] == len(PROMPTS) - done
        assert again.read_bytes() == data


def test_answers_of_another_kind_are_not_touched(model, tokenizer, tmp_path):
    """Other settings, another model, other prompts: refused, and the file stays as it was."""
    prompts = read_prompts(_written(tmp_path))
    output = tmp_path / "a.jsonl"
    answer(model, tokenizer, prompts, output, batch=2, about={"model": "m"}, **GREEDY)
    before = output.read_bytes()
    for asked, about, options in [
        (prompts, {"model": "other"}, GREEDY),
        (prompts, {"model": "m"}, {**GREEDY, "max_new_tokens": 9}),
        (prompts[1:], {"model": "m"}, GREEDY),
        (prompts[::-1], {"model": "m"}, GREEDY),
    ]:
        with pytest.raises(UserError, match="other prompts, or of another model or other settings"):
            answer(model, tokenizer, asked, output, batch=2, about=about, **options)
    assert output.read_bytes() == before


def test_a_disk_that_fills_up_is_a_message_and_loses_no_answer(folder, tmp_path):
    """Files of at most 1 KiB in place of a full disk; with room the same command goes on, and the answers are those of one go.
    A standard output that is full, with prompts and with one: a message too."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("".join(f"prompt {n}\n" for n in range(12)))
    command = [sys.executable, "-m", "slm", "generate", str(folder), "--temperature", "0", "--max-new-tokens", "8"]
    of_file = [*command, "--prompts", str(prompts), "--batch", "2"]
    full = subprocess.run(
        ["bash", "-c", f"ulimit -f 1; {shlex.join([*of_file, '--output', str(tmp_path / 'a.jsonl')])}"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert (full.returncode, "Traceback" in full.stderr) == (3, False), full.stderr
    assert "a.jsonl cannot be written: File too large" in full.stderr
    assert (tmp_path / "a.jsonl").stat().st_size <= 1024
    for name in "a.jsonl", "whole.jsonl":
        assert run_slm(*of_file[3:], "--output", str(tmp_path / name)) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    for asked in of_file, [*command, "x"]:
        with open("/dev/full", "w") as sink:
            full = subprocess.run(asked, stdout=sink, stderr=subprocess.PIPE, text=True, timeout=100)
        assert full.returncode == 3
        assert "standard output cannot be written: No space left" in full.stderr
        assert "Traceback" not in full.stderr
        assert "Exception ignored" not in full.stderr


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", "", "empty"),
        ("a.jsonl", '{"prompt": "x"}\n{"text": "x"}\n', "line 2 has no text as `prompt`"),
        ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": \n', "line 3 is no JSON"),
        ("a.jsonl", '{"prompt": "x", "completion": "y"}', "a field completion"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", '{"prompt": "x", "deep": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 is no JSON"),
    ],
)
def test_files_that_are_no_prompts(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=told):
        read_prompts(tmp_path / name)


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_made(model, tokenizer, tmp_path):
    file, output = tmp_path / "p.txt", tmp_path / "a.jsonl"
    file.write_text("short\n" + "x" * 300 + "\n")
    with pytest.raises(
        UserError, match=r"p.txt, line 2: 301 tokens and 8 new ones are more than the model's context of 256"
    ):
        answer(model, tokenizer, read_prompts(file), output, batch=1, about={}, **GREEDY)
    assert not output.exists()


def test_an_output_that_is_no_file_is_refused(model, tokenizer, tmp_path):
    """A pipe cannot be read for what is there already: that would wait for ever (and /dev/full fills the memory)."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is no file"):
        answer(model, tokenizer, read_prompts(_written(tmp_path)), tmp_path / "pipe", batch=2, about={}, **GREEDY)


def test_a_byte_order_mark_is_no_part_of_a_prompt_and_not_a_number_equals_itself(model, tokenizer, tmp_path):
    """As some editors write files; and fields that are not finite do not keep a file from going on."""
    file, output = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    file.write_bytes('\ufeff{"prompt": "x", "score": NaN}\n'.encode())
    prompts = read_prompts(file)
    assert prompts[0].text == "x"
    assert answer(model, tokenizer, prompts, output, batch=2, about={}, **GREEDY)[0] == 1
    assert answer(model, tokenizer, prompts, output, batch=2, about={}, **GREEDY)[0] == 0


def _written(folder):
    file = folder / "p.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


# --- chat ---------------------------------------------------------------------------------------------------


def test_a_chat_without_template_is_a_transcript(model, tokenizer):
    """What is asked of the model is the transcript so far, and its answer ends where it speaks for the user."""
    chat = Chat(model, tokenizer, template=None, **GREEDY)
    first = chat.answer("hello ")
    ids = chat.prompt_ids([*chat.turns, {"role": "user", "content": "more"}])
    assert tokenizer.decode(ids) == f"User: hello\nAssistant: {first}\nUser: more\nAssistant:"
    assert ids[0] == tokenizer.bos_token_id
    [alone] = continuations(model, tokenizer, encode_prompts(tokenizer, ["User: hello\nAssistant:"]), **GREEDY)
    assert first == alone.text.strip()


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("said", "shown", "ended"),
    [
        ("Yes.\nUsual.\nUser: no", "Yes.\nUsual.", True),
        ("Yes.\nUse", "Yes.\nUse", False),  # what only began like it is shown after all
        ("\n\nUser:", "\n", True),
        ("", "", False),
    ],
)
def test_the_users_name_ends_a_turn_and_is_not_shown(said, shown, ended, size):
    """In whatever pieces it comes."""
    turn, told = OneTurn(stop="\nUser:"), ""
    for start in range(0, len(said), size):
        told += turn.add(said[start : start + size])
        if turn.ended:
            break
    assert (told + turn.rest(), turn.ended) == (shown, ended)


def test_the_models_own_template_is_used(model, tokenizer, folder, tmp_path):
    """From either of the two files where it may stand; special tokens in it are tokens."""
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert find_template(tmp_path) == template
    (tmp_path / "chat_template.jinja").write_text(template + "!")
    assert find_template(tmp_path) == template + "!"
    assert find_template(folder) is None
    chat = Chat(model, tokenizer, template=template, **GREEDY)
    ids = chat.prompt_ids([{"role": "user", "content": "hi"}])
    want = tokenizer.encode("[user]hi", add_bos=True, add_eos=True) + tokenizer.encode("[assistant]")
    assert ids == want


def test_a_template_says_what_transformers_makes_of_it():
    """Its tag for trainers, its filter for JSON, whitespace, loop controls."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (
        "{% for m in messages %}\n  {% if loop.index > 2 %}{% break %}{% endif %}\n"
        "{% if m.role == 'user' %}[{{ m | tojson }}]{% else %}{%- generation -%} {{ m.content }}{{ '.' }} {% endgeneration %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    turns = [
        {"role": "user", "content": "ä < b & 'c'"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": ""},
    ]
    [want], _ = render_jinja_template([turns], chat_template=template, add_generation_prompt=True)
    assert _compiled(template).render(messages=turns, add_generation_prompt=True) == want
    assert "< b &" in want
    assert "yes." in want


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for %}", "is none"),
        ("{{ raise_exception('roles must alternate') }}", "fails: roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "fails: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: maximum recursion"),
        ("{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}", "is none"),
    ],
)
def test_templates_that_fail_or_do_what_they_must_not(model, tokenizer, template, told):
    with pytest.raises(UserError, match=told):
        Chat(model, tokenizer, template=template, **GREEDY).answer("x")


def test_a_full_context_forgets_the_oldest(model, tokenizer, capsys):
    """And says so; a turn that alone is too long is refused, and was never said."""
    chat = Chat(model, tokenizer, template=None, **GREEDY)
    for _ in range(4):
        chat.answer("x" * 60)
    assert "exchanges are forgotten" in capsys.readouterr().err
    assert len(chat.prompt_ids(chat.turns)) <= 256
    kept = list(chat.turns)
    with pytest.raises(UserError, match="this turn alone is"):
        chat.answer("y" * 300)
    assert chat.turns == kept


def test_a_seed_gives_the_same_chat_and_other_numbers_for_each_answer(model, tokenizer):
    """The same turns twice are the same answers; a turn that is forgotten and said again is answered otherwise."""

    def answers():
        chat = Chat(model, tokenizer, template=None, max_new_tokens=12, seed=5, temperature=5.0)
        found = []
        for _ in range(3):
            chat.turns = []
            found.append(chat.answer("hello"))
        return found

    assert answers() == answers()
    assert len(set(answers())) == 3


# --- the command --------------------------------------------------------------------------------------------


def test_the_command_chats_over_standard_input(folder, monkeypatch, capsys):
    """Two turns and the end of the input; answers alone go to standard output."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nyou\n"))
    assert run_slm("generate", str(folder), "--chat", "--temperature", "0", "--max-new-tokens", "4") == 0
    told = capsys.readouterr()
    assert "no chat template" in told.err
    assert told.out.count("\n") >= 2


def test_a_turn_that_fails_ends_a_chat_that_no_one_sits_at(folder, monkeypatch, capsys):
    """With an exit code, as of any other command in a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 300 + "\nhello\n"))
    assert run_slm("generate", str(folder), "--chat", "--max-new-tokens", "4") == 2
    assert "this turn alone is" in capsys.readouterr().err


@pytest.mark.timeout(120)
def test_keys_on_a_terminal(folder):
    """Ctrl-C ends an answer half way and the chat goes on, at the prompt it does nothing, Ctrl-D ends with code 0."""
    command = [
        sys.executable,
        "-m",
        "slm",
        "generate",
        str(folder),
        "--chat",
        "--max-new-tokens",
        "200",
        "--temperature",
        "0",
    ]
    # A child of its own makes it its terminal: to fork this process, which has threads, could leave a lock held for ever.
    take_terminal = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
    on_terminal = f"{take_terminal}; os.execv(sys.argv[1], sys.argv[1:])"
    terminal, theirs = pty.openpty()
    chat = subprocess.Popen([sys.executable, "-c", on_terminal, *command], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        read_until(terminal, "> ")
        os.write(terminal, b"hello\n")
        read_until(terminal, "hello\r\n")
        read_until(terminal, "")  # something of the answer
        press_ctrl_c(terminal, "\n> ")
        press_ctrl_c(terminal, "\n> ")
        os.write(terminal, b"/new\n")
        read_until(terminal, "/new\r\n> ")
        os.write(terminal, b"\x04")
        assert chat.wait() == 0
    finally:
        chat.kill()
        chat.wait()
        os.close(terminal)


def press_ctrl_c(terminal, wanted):
    """Until the terminal shows `wanted`: one that comes just before input() waits is seen with the next key."""
    shown = ""
    while wanted not in shown:
        os.write(terminal, b"\x03")
        while select.select([terminal], [], [], 1.0)[0]:
            shown += os.read(terminal, 64).decode(errors="replace")


def read_until(terminal, wanted):
    """What a terminal shows, up to `wanted`, or whatever comes next. The test's time limit ends a wait in vain."""
    shown = ""
    while not shown or wanted not in shown:
        try:
            shown += os.read(terminal, 1 if wanted else 64).decode(errors="replace")
        except OSError:  # it has ended
            raise AssertionError(f"the command ended: {shown}") from None
    return shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "there is nothing to continue"),
        (["x", "--chat"], "PROMPT and --chat at once"),
        (["x", "--output", "a.jsonl"], "--output has no effect"),
        (["x", "--batch", "4"], "--batch has no effect"),
        (["--prompts", "nowhere.txt"], "cannot be read"),
        (["--prompts", str(SHORT_LINES), "--output", "/dev/full"], "/dev/full is no file"),
    ],
)
def test_contradictions_are_refused(folder, capsys, arguments, told):
    assert run_slm("generate", str(folder), *arguments) == 2
    assert told in capsys.readouterr().err


def test_stop_ids_of_the_folder_end_a_text(folder, model, tokenizer, tmp_path, capsys):
    """The ids of generation_config.json, of which instruct models have several."""
    [free] = continuations(model, tokenizer, encode_prompts(tokenizer, ["the fox"]), do_sample=False, max_new_tokens=20)
    ids = tokenizer.encode(free.text)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "generation_config.json").read_text())
    stop = next(id_ for id_ in ids if id_ < 128)
    (copy / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [tokenizer.eos_token_id, stop]}))
    command = ("the fox", "--temperature", "0", "--max-new-tokens", "20")
    assert run_slm("generate", str(copy), *command) == 0
    shorter = capsys.readouterr().out
    assert run_slm("generate", str(folder), *command) == 0
    longer = capsys.readouterr().out
    assert longer.startswith(shorter.rstrip("\n"))
    assert len(shorter) < len(longer)
