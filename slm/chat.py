"""A chat on the terminal: what has been said so far as the prompt, the model's turn as its continuation.

Owns how turns become a prompt: by the template that comes with the model (Jinja, in a sandbox), else as a transcript, which
a model that was only pretrained goes on with.

    Chat(model, tokenizer, template=find_template(folder)).run()
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slm.completion import continuations, with_bos
from slm.errors import UserError
from slm.model.hf import read_json
from slm.model.llama import SLMForCausalLM

_USER, _ASSISTANT = "User:", "Assistant:"
_HELP = "Ctrl-D ends, Ctrl-C cuts an answer short, /new begins anew."


class _TurnEnds(Exception):
    """What the model says from here on is the user's turn."""


def find_template(folder: Path) -> str | None:
    """The chat template of a Hugging Face folder: chat_template.jinja, else in tokenizer_config.json. Raises CorruptArtefact."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    config = folder / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):  # several, by name
        named = [each for each in template if isinstance(each, dict) and each.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


class Chat:
    """The turns so far, and what the next is made with. options: those of `continuations` and `generate`."""

    def __init__(
        self,
        model: SLMForCausalLM,
        tokenizer: Any,
        *,
        template: str | None,
        max_new_tokens: int,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._template = None if template is None else _compiled(template)
        self._max_new_tokens = max_new_tokens
        self._options = options
        self._seed = seed  # of the next answer: with the same one for each, all would draw the same numbers
        self.turns: list[dict[str, str]] = []

    def run(self) -> None:
        """Reads turns from standard input until it ends; answers go to standard output, all else to standard error."""
        kind = (
            "This model has no chat template: it continues a transcript, as one that was only pretrained can."
            if self._template is None
            else "The model's own chat template is used."
        )
        print(f"{kind} {_HELP}", file=sys.stderr)
        if sys.stdin.isatty():
            import readline  # noqa: F401 (input() then edits lines and knows earlier ones)
        while True:
            try:
                if not self._take_turn():
                    return
            except KeyboardInterrupt:  # at the prompt; or meant for the answer, which has just ended
                print(file=sys.stderr)

    def _take_turn(self) -> bool:
        """False at the end of the input. Raises UserError, but on a terminal."""
        try:
            said = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            print(file=sys.stderr)
            return False
        if said.strip() == "/new":
            self.turns = []
        elif said.strip():
            try:
                self.answer(said)
            except UserError as error:
                if not sys.stdin.isatty():  # nobody is there to say it otherwise
                    raise
                print(f"{error}", file=sys.stderr)
        return True

    def answer(self, said: str) -> str:
        """Says something, and returns what the model answers, written to standard output as it comes. Raises UserError; then
        nothing was said."""
        before = self.turns
        self.turns = [*before, {"role": "user", "content": said}]
        try:
            ids = self._fitting_ids()
            answer = self._stream(ids)
        except UserError:
            self.turns = before
            raise
        self.turns = [*self.turns, {"role": "assistant", "content": answer}]
        return answer

    def _fitting_ids(self) -> list[int]:
        """The prompt. The oldest exchanges are left out where all is too long. Raises UserError."""
        room = self._model.config.max_position_embeddings - self._max_new_tokens
        dropped = 0
        while len(ids := self.prompt_ids(self.turns[dropped:])) > room:
            dropped += 2
            if dropped >= len(self.turns):
                raise UserError(
                    f"this turn alone is {len(ids)} tokens, and with {self._max_new_tokens} new ones does not fit into the "
                    f"model's context of {self._model.config.max_position_embeddings}",
                    fix="say less at once, or lower --max-new-tokens",
                )
        if dropped:
            self.turns = self.turns[dropped:]
            print(f"(the context is full: the first {dropped // 2} exchanges are forgotten)", file=sys.stderr)
        return ids

    def prompt_ids(self, turns: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of the turns, up to where the model's next one begins. Raises UserError."""
        if self._template is None:
            names = {"user": _USER, "assistant": _ASSISTANT}
            text = "".join(f"{names[turn['role']]} {turn['content'].strip()}\n" for turn in turns) + _ASSISTANT
            ids = list(self._tokenizer.encode(text))
        else:
            ids = list(self._tokenizer.encode(self._render(turns), allow_special=True))
        return with_bos(self._tokenizer, ids)

    def _render(self, turns: Sequence[dict[str, str]]) -> str:
        assert self._template is not None
        decode = self._tokenizer.decode
        names = {
            f"{role}_token": "" if id_ is None else decode([id_], skip_special_tokens=False)
            for role, id_ in (("bos", self._tokenizer.bos_token_id), ("eos", self._tokenizer.eos_token_id))
        }
        try:
            return self._template.render(messages=list(turns), add_generation_prompt=True, **names)
        except Exception as error:
            # A template is a program: it can divide by zero, take too large a range, call itself.
            raise UserError(
                f"the model's chat template fails: {error}",
                fix="mend chat_template.jinja in its folder, or remove it for a plain transcript",
            ) from None

    def _stream(self, ids: list[int]) -> str:
        shown: list[str] = []
        turn = OneTurn(stop="" if self._template is not None else f"\n{_USER}")

        def write(text: str) -> None:
            shown.append(text)
            sys.stdout.write(text)
            sys.stdout.flush()

        def take(_: int, text: str) -> None:
            write(turn.add(text))
            if turn.ended:
                raise _TurnEnds

        try:
            continuations(
                self._model,
                self._tokenizer,
                [ids],
                on_text=take,
                max_new_tokens=self._max_new_tokens,
                seed=self._seed,
                **self._options,
            )
        except (_TurnEnds, KeyboardInterrupt):
            pass
        if self._seed is not None:
            self._seed = (self._seed + 1) % 2**63
        write(turn.rest())
        sys.stdout.write("\n")
        sys.stdout.flush()
        return "".join(shown).strip()


class OneTurn:
    """Text as it comes, up to `stop`, of which no part is let through. An empty stop ends nothing."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._held = ""  # may yet become the stop
        self.ended = False

    def add(self, text: str) -> str:
        """What can be shown now."""
        self._held += text
        if self._stop:
            before, found, _ = self._held.partition(self._stop)
            if found:
                self.ended, self._held = True, ""
                return before
        longest = min(len(self._held), len(self._stop))
        keep = next((n for n in range(longest, 0, -1) if self._held.endswith(self._stop[:n])), 0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def rest(self) -> str:
        """What was held back, once nothing more comes."""
        return self._held


def _compiled(template: str) -> Any:
    """Raises UserError. The sandbox keeps a template, which came with weights from anywhere, from running what it likes."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks, for who trains, what the model says; here its content is shown as it is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    # As transformers has it; jinja's own is for HTML and turns < into an escape.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": refuse, "strftime_now": _now}
    try:
        return environment.from_string(template)
    except (TemplateError, RecursionError) as error:
        raise UserError(
            f"the model's chat template is none: {error}", fix="mend chat_template.jinja in its folder"
        ) from None


def _now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)
