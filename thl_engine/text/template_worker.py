"""The process that renders one chat template: run as a script, it reads a request and writes an answer, both JSON.

A template is a program of the checkpoint's author. Jinja's sandbox keeps it from the machine, but bounds neither time
nor memory, and constants are folded while it is compiled. So it runs here, under limits that the system enforces, and
without the engine: this file imports Jinja alone. The environment is that of Hugging Face transformers.

Request: path (where to import from), source, values (what the template may name), limit (characters of the text).
Answer: text, or error and whether it came of compiling.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

MEMORY_LIMIT = 512 << 20  # bytes of address space
CPU_LIMIT = 3  # seconds


def main() -> None:
    """Answers the request on stdin."""
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    import jinja2  # noqa: F401  before the limits, which are the template's

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT))
    json.dump(rendered(request["source"], request["values"], request["limit"]), sys.stdout)


def rendered(source: str, values: dict[str, Any], limit: int) -> dict[str, Any]:
    """The answer to a request."""
    compiling = True
    try:
        template = environment().from_string(source)
        compiling = False
        text = template.render(values)
        if len(text) <= limit:
            return {"text": text}
        message = f"it makes {len(text)} characters, allowed are {limit}"
    except MemoryError:
        message = f"it needs more than {MEMORY_LIMIT >> 20} MiB"
    except RecursionError:
        message = "it is nested too deeply"
    except Exception as error:  # a template may fail in any way that Python code can
        message = str(error)[:1000] or type(error).__name__
    return {"error": message, "compiling": compiling}


def environment() -> Any:
    """Jinja as transformers sets it up (chat_template_utils.py): filters, functions and tags that templates rely on."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %}: marks what the assistant wrote, for training; rendered as what is inside."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Any) -> str:
            inside: str = caller()
            return inside

    class Dict:
        """`dict` without the attributes of a class."""

        def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
            return dict(*args, **fields)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    class PlainNamespace(Namespace):
        """`namespace` without attributes that begin with an underscore."""

        def __init__(*args: Any, **fields: Any) -> None:  # without a `self` of its own, which may be a field's name
            self, given = args[0], dict(*args[1:], **fields)
            for name in given:
                PlainNamespace.check(name)
            Namespace.__init__(self, given)

        def __setitem__(self, name: str, value: Any) -> None:
            PlainNamespace.check(name)
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a namespace has no attribute {name[:40]!r}")

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: object) -> NoReturn:
        raise TemplateError(str(message))

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": PlainNamespace,
    }
    return made


if __name__ == "__main__":
    main()
