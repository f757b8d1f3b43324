"""A checkpoint's chat template: messages to the text of a prompt, rendered by a process of its own within limits.

Nothing of a template is looked at before it is used: opening a checkpoint only keeps its text. A process a rendering,
which takes about 0.1 s, leaves nothing behind from one to the next.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from thl_engine.errors import TokenizerError, said, shown
from thl_engine.text import template_worker

JINJA_NEEDED = (3, 1, 6)  # versions before have known ways out of the sandbox
WALL_LIMIT = 20.0  # seconds
TEXT_LIMIT = 1 << 20  # characters that a template may add to its messages, whatever they are
GROWTH_LIMIT = 4  # times the messages' own characters, besides
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field; templates read the first two
_INSTALL = "pip install 'jinja2>=3.1.6'"


class ChatTemplate:
    """Jinja templates by name, one of which turns messages into the text of a prompt, as transformers does."""

    def __init__(self, sources: str | Mapping[str, str], tokens: Mapping[str, str]) -> None:
        """sources: a template, or several, name -> template, "default" for the usual one. tokens: texts that they may
        name, such as bos_token."""
        self._sources = {"default": sources} if isinstance(sources, str) else dict(sources)
        self._tokens = dict(tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        name: str | None = None,
        **values: Any,
    ) -> str:
        """The prompt that messages make, up to where the answer begins.

        messages: each with "role" ("user", "assistant", "system") and "content" or "tool_calls", of plain data. tools:
        JSON schemas of functions. name: of the template; without one "tool_use" where there are tools, else "default".
        values: what else the template may name. TokenizerError where the template is none, refuses the messages, or
        takes more than its share of time and memory.
        """
        given = {
            "messages": [_message(message) for message in messages],
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": True,
            **self._tokens,
            **values,
        }
        source = self._named(name, tools is not None)
        try:
            size = len(json.dumps(given))
            request = {"path": [entry for entry in sys.path if entry], "source": source, "values": given}
            text = json.dumps({**request, "limit": TEXT_LIMIT + GROWTH_LIMIT * size})
        except (TypeError, ValueError, RecursionError) as error:
            raise TokenizerError(f"messages must be plain texts, numbers, lists and maps: {said(error)}") from None
        answer = _answered(text)
        if "text" in answer:
            rendered: str = answer["text"]
            return rendered
        what = "is no Jinja template" if answer["compiling"] else "does not take these messages"
        raise TokenizerError(f"the chat template {what}: {said(answer['error'])}")

    def _named(self, name: str | None, tools: bool) -> str:
        if name is None:
            name = "tool_use" if tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise TokenizerError(f"the checkpoint has no chat template {shown(name)}, only {said(list(self._sources))}")
        return self._sources[name]


def _message(message: Any) -> dict[str, Any]:
    """A message without fields that are None, and with the text of its reasoning under each name for it."""
    if not isinstance(message, Mapping):
        raise TokenizerError(f"a message must have a role and a content, found {shown(message)}")
    fields = {key: value for key, value in message.items() if value is not None}
    if "role" not in fields or not {"content", "tool_calls"} & fields.keys():
        raise TokenizerError(f"a message must have a role and a content, found {shown(message)}")
    reasoning = next((fields[name] for name in REASONING if name in fields), None)
    if reasoning is not None:
        fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
    return fields


def _answered(request: str) -> dict[str, Any]:
    """What the worker makes of a request. Its failures are the template's."""
    try:
        version = metadata.version("jinja2")
    except metadata.PackageNotFoundError:
        raise TokenizerError(f"a chat template needs the package `jinja2`: {_INSTALL}") from None
    if tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:3]) < JINJA_NEEDED:
        raise TokenizerError(f"jinja2 is {said(version)}, too old to run foreign templates safely: {_INSTALL}")
    command = [sys.executable, "-I", str(Path(template_worker.__file__))]
    try:
        done = subprocess.run(
            command,
            input=request.encode(),
            capture_output=True,
            timeout=WALL_LIMIT,
            start_new_session=True,  # Ctrl-C is this process's matter
        )
    except subprocess.TimeoutExpired:
        raise TokenizerError(f"the chat template was not done after {WALL_LIMIT:g} s") from None
    except (OSError, ValueError) as error:
        raise TokenizerError(f"no process for the chat template: {said(error)}") from None
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout)
        return found
    if done.returncode < 0:
        limits = f"{template_worker.CPU_LIMIT} s and {template_worker.MEMORY_LIMIT >> 20} MiB"
        message = f"the chat template takes more than it may of time or memory ({limits})"
    else:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        message = f"the process for the chat template failed: {said(*last)}"
    raise TokenizerError(message)
