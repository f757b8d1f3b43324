"""The options of every command. Nothing here imports torch, so that help and wrong usage answer at once."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from thl_engine import __doc__ as PURPOSE
from thl_engine import __version__
from thl_engine.cli import training

STEPS = 256  # a multiple of common clock periods, so that a benchmark reads what an average token reads


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options of `thl`. `command` names the function that carries it out, as "module.function"."""
    parser = argparse.ArgumentParser(
        prog="thl",
        allow_abbrev=False,
        description=PURPOSE,
        epilog="`thl COMMAND --help` explains a command's options. Results go to stdout, everything else to stderr.",
    )
    parser.add_argument("--version", action="version", version=f"thl_engine {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (fill, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=_sentence(about), allow_abbrev=False)
        fill(command)
    return _checked(parser.parse_args(argv))


def parse_run(argv: Sequence[str]) -> argparse.Namespace:
    """Options of `thl-run`."""
    parser = argparse.ArgumentParser(prog="thl-run", description=_sentence(COMMANDS["run"][1]), allow_abbrev=False)
    _run(parser)
    return _checked(parser.parse_args(argv))


def _checked(arguments: argparse.Namespace) -> argparse.Namespace:
    """The options, if they go together; else wrong usage."""
    if "check" in (arguments or ()):
        arguments.check(arguments)
    return arguments


def _sentence(about: str) -> str:
    return about[0].upper() + about[1:] + "."


def _run(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command="generate.run", check=partial(_check_files, parser))
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help="a .safetensors file, or a folder with config.json and *.safetensors",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue; - reads stdin (default: what is piped in, else a new line); given "
        "several times, all are continued with one pass over the weights for each token",
    )
    parser.add_argument(
        "--prompt-ids",
        action="append",
        metavar="IDS",
        help="the prompt as token ids instead, such as 1,2,3; @FILE reads them from a file; - from stdin",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="tokens to write at most (default: 128, or what the context has room for)",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    sampling = parser.add_argument_group(
        "sampling",
        "Defaults are 1, all, all and 1; with --input 1, 50, 0.9 as published; with --chat what the model's "
        "generation_config.json says, or 0.8, 50, all.",
    )
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token each time")
    sampling.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens; 0 for all")
    sampling.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="choose among the likeliest that together exceed probability P; 1 for all",
    )
    sampling.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="above 1 disfavours tokens that occurred lately"
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="same seed, same text (default: a new one each time)")
    _engine(parser)
    _cache(parser)
    parser.add_argument(
        "--quantize",
        choices=("auto", "int8", "none"),
        default="auto",
        help="weights as stored, as int8, or only as floats (default: %(default)s)",
    )
    context = parser.add_argument_group("context")
    context.add_argument("--state", metavar="FILE", help="go on from a context that --save-state wrote")
    context.add_argument(
        "--save-state", metavar="FILE", help="keep the context afterwards: all that was read and written"
    )
    batch = parser.add_argument_group("many prompts, for models that answer in one pass (him)")
    batch.add_argument(
        "--input",
        metavar="FILE",
        help='JSON list of objects with the text under "prompt" or '
        '"input"; each is answered at the model\'s own length',
    )
    batch.add_argument("--output", metavar="FILE", help='where to write that list with "output" and "ids" added')
    thinking = parser.add_argument_group("models that think in cycles (hrm, hrm_text, hrm_gemma3n)")
    _mode(thinking)
    thinking.add_argument("--max-cycles", type=int, metavar="N", help="hrm_gemma3n: cycles that a token takes at most")
    thinking.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="follow the rules of the published chat, the only way in which the published model "
        "writes: the last 60 tokens of the prompt; an end at <PAD>, <EOS> or the 11th "
        "repetition of a token (default: for hrm models, yes); of other models: ask for an answer to the prompt by the "
        "chat template of the checkpoint, which needs jinja2, or where it has none by hrm_text's tags",
    )
    thinking.add_argument(
        "--condition",
        metavar="TAGS",
        help="hrm_text: with --chat, tags of the answer: direct, cot, noisy, synth, or several (default: synth,cot)",
    )
    report = parser.add_argument_group("output")
    report.add_argument("--stats", action="store_true", help="end with speed, traffic and memory on stderr")
    report.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object (text, ids, logprobs, stats) in place of the text; a list of them "
        "for several prompts",
    )


def _check_files(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.prompt_ids is not None and (arguments.prompt is not None or arguments.chat):
        parser.error("--prompt-ids goes without --prompt and --chat")
    if arguments.condition is not None and not arguments.chat:
        parser.error("--condition goes with --chat")
    if (arguments.input is None) != (arguments.output is None):
        parser.error("--input and --output go together")
    excluded = ("prompt", "prompt_ids", "stop", "state", "save_state", "json", "mode", "chat", "repetition_penalty")
    for name in excluded if arguments.input is not None else ():
        if getattr(arguments, name) not in (None, [], False):
            parser.error(f"--{name.replace('_', '-')} does not go with --input")


def _mode(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--mode",
        metavar="M",
        help="hrm: cycles of a segment, hrm_text: of a token, fast, normal, deep, thorough or extreme; hrm_gemma3n: "
        "cycles of a token, math, code or agent; or NxT such as 3x2; other cycles than the model was trained with "
        "change what it computes (default: hrm normal, others the model's own)",
    )


def _engine(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="page from disk, by schedule, what the memory budget has no room for, or keep all in memory (default: "
        "page if it does not fit)",
    )
    engine.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="bound on what the engine keeps in memory, for example 4GiB (default: what is free; with --stream no more "
        "than 4GiB)",
    )
    engine.add_argument(
        "--host-memory",
        metavar="SIZE",
        help="with a CUDA device, how much of what is streamed to it stays in the host's memory "
        "(default: half of what is free)",
    )
    engine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    engine.add_argument(
        "--backend",
        default="auto",
        help="native (C++, for the CPU), triton (for CUDA), reference (torch), or auto: the first of "
        "these that there is (default: %(default)s)",
    )
    engine.add_argument(
        "--checksums",
        dest="verify",
        choices=("first", "always"),
        help="compare a page with its checksum when it is first read, or at every read (default: first)",
    )
    engine.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one a processor)")


def _cache(parser: argparse.ArgumentParser) -> None:
    cache = parser.add_argument_group("KV cache, for models that have one")
    cache.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens that a sequence may grow to; the memory budget holds so many (default: the most "
        "that the model has)",
    )
    cache.add_argument(
        "--kv-cache",
        choices=("float32", "int8"),
        default="float32",
        help="how keys and values are kept; int8 takes a quarter (default: %(default)s)",
    )
    cache.add_argument(
        "--sliding-window",
        type=int,
        metavar="N",
        help="attend to the last N tokens only: tokens further back are no longer seen, which changes "
        "what the model says (default: all tokens)",
    )


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was said of the engine, by the names of `EngineOptions.of`."""
    names = (
        "device",
        "backend",
        "stream",
        "memory_budget",
        "threads",
        "batch_size",
        "context",
        "kv_cache",
        "sliding_window",
        "host_memory",
        "verify",
    )
    options = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    if options.get("stream") and "memory_budget" not in options:
        from thl_engine.engine.resources import promised_budget  # which imports torch; so does who opens an engine

        options["memory_budget"] = promised_budget(options["device"])
    return options


def _quantize(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command="files.quantize")
    parser.add_argument("source", metavar="IN", help="a float checkpoint: file or folder")
    parser.add_argument("target", metavar="OUT", help="the file to write: ordinary safetensors, laid out for paging")
    parser.add_argument("--bits", type=int, default=8, choices=(8,), help="bits of a weight (default: %(default)s)")
    parser.add_argument(
        "--group-size",
        type=int,
        default=0,
        choices=(0, 128),
        help="inputs that share a scale, 0 for one scale a row (default: %(default)s)",
    )


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command="files.convert")
    parser.add_argument(
        "source",
        metavar="IN",
        help="folder with config.json and pytorch_model.bin, or a .bin, .pt or .pth file; nothing in it is executed",
    )
    parser.add_argument("target", metavar="OUT", help="a .safetensors file, or a folder to write")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="JSON configuration, or a published size such as inl-small "
        "(default: config.json beside the file, or what is in it)",
    )


def _init(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command="files.init", check=partial(_check_init, parser))
    parser.add_argument(
        "--model-type", metavar="T", help="architecture, such as thl (default: as the configuration says)"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="JSON configuration of the model, or a published size: small, medium, 5b or 10b of inl",
    )
    parser.add_argument(
        "--base",
        metavar="PATH",
        help="hrm_gemma3n: a gemma3n checkpoint, for which adapters are "
        'written; --config may then be left out, or hold "hrm" alone',
    )
    parser.add_argument("target", metavar="OUT", help="the .safetensors file to write; with --base a folder")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="same seed, same weights (default: %(default)s)"
    )
    parser.add_argument(
        "--quantize",
        choices=("none", "int8"),
        default="none",
        help="write float32 or int8 weights (default: %(default)s)",
    )


def _check_init(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.base is None and arguments.config is None:
        parser.error("one of --config and --base is needed")
    if arguments.base is not None and arguments.quantize != "none":
        parser.error("--quantize does not go with --base: adapters stay floats")


def _grow(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command="files.grow", check=partial(_check_growth, parser))
    parser.add_argument("source", metavar="IN", help="a float checkpoint of an hrm model: file or folder")
    parser.add_argument(
        "target", metavar="OUT", help="the .safetensors file to write; what the model has is kept bit for bit"
    )
    tokens = parser.add_mutually_exclusive_group()
    tokens.add_argument("--vocabulary", type=int, metavar="N", help="tokens afterwards")
    tokens.add_argument("--text", metavar="FILE", help="a text whose characters the vocabulary has afterwards")
    parser.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="layers that each of the two modules has afterwards; new ones need training",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the new weights (default: %(default)s)")


def _check_growth(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.vocabulary is None and arguments.text is None and arguments.layers is None:
        parser.error("one of --vocabulary, --text and --layers is needed")


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command="plan.run")
    parser.add_argument("path", metavar="PATH", help="a checkpoint: file or folder")
    parser.add_argument("--memory-budget", metavar="SIZE", help="for example 4GiB (default: what is free)")
    parser.add_argument(
        "--host-memory",
        metavar="SIZE",
        help="with a CUDA device, how much of what is streamed to it stays in the host's memory "
        "(default: half of what is free)",
    )
    parser.add_argument(
        "--disk-bandwidth",
        type=_rate,
        metavar="GB/s",
        help="what reading pages achieves (default: measured on the file itself)",
    )
    parser.add_argument(
        "--memory-bandwidth",
        type=_rate,
        metavar="GB/s",
        help="what products with weights in memory achieve (default: computing is measured on steps of the model "
        "itself, or the bandwidth is assumed of a CUDA device that is not here)",
    )
    parser.add_argument(
        "--link-bandwidth",
        type=_rate,
        metavar="GB/s",
        help="from the host to a CUDA device, which every streamed page passes after the disk "
        "(default: measured, or assumed of one that is not here)",
    )
    _batch(parser)
    _cache(parser)
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N, which need not be here (default: %(default)s)"
    )
    parser.add_argument(
        "--backend",
        default="auto",
        help="native (C++, for the CPU), triton (for CUDA), reference (torch), or auto: the first of "
        "these that there is (default: %(default)s)",
    )
    _mode(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command="inspect.run")
    parser.add_argument("path", metavar="PATH", help="a checkpoint: file or folder")
    parser.add_argument("--verify", action="store_true", help="read every page and check its checksum")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command="bench.run")
    parser.add_argument("path", metavar="PATH", help="a checkpoint: file or folder")
    parser.add_argument(
        "--tokens", type=int, default=STEPS, metavar="N", help="tokens to decode, timed (default: %(default)s)"
    )
    parser.add_argument(
        "--warmup", type=int, default=16, metavar="N", help="tokens before the clock starts (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random tokens (default: %(default)s)")
    _batch(parser)
    _engine(parser)
    _cache(parser)
    _mode(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")


def _batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="sequences that share each pass over the weights (default: %(default)s)",
    )


def _train(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command="training.run")
    training.add_options(parser)


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value * 1e9


COMMANDS = {
    "run": (_run, "continue a prompt, writing the text as it comes"),
    "quantize": (_quantize, "write a float checkpoint as int8 pages"),
    "convert": (_convert, "write a .bin, .pt or .pth checkpoint as safetensors"),
    "init": (_init, "write a model of random weights, of any size"),
    "grow": (_grow, "write an hrm model with more tokens or more layers"),
    "plan": (_plan, "tell what a memory budget costs: what is pinned, what is streamed, how fast"),
    "inspect": (_inspect, "tell what is in a checkpoint: tensors, pages, schedule"),
    "train": (_train, "train a small model on a text"),
    "bench": (_bench, "measure decoding against the bandwidth of the memory"),
}
