"""What is in a checkpoint: tensors, pages and schedule, as values and as text; and whether its pages are sound."""

from collections import deque
from typing import Any

from thl_engine.checkpoint.pack import Progress
from thl_engine.checkpoint.page import extent, label
from thl_engine.checkpoint.store import Store
from thl_engine.files import ALIGNMENT
from thl_engine.memory import size
from thl_engine.paging.reader import Arena, Reader
from thl_engine.report.table import table

SLOTS = 4  # pages in flight while verifying


def summarise(store: Store) -> dict[str, Any]:
    """Everything worth knowing about an open checkpoint, ready for JSON. No weights are read."""
    config, model = store.config, store.architecture
    state = model.init_state(config, 1, "meta")
    blocks, walk, head = model.blocks(config), model.walk(config), model.head(config)
    tensors = store.tensors
    kinds: dict[tuple[str, str], dict[str, int]] = {}
    for name, tensor in tensors.items():
        scales = any(name == other.scales for other in tensors.values())
        entry = kinds.setdefault(
            ("scales" if scales else tensor.kind, str(tensor.dtype).removeprefix("torch.")),
            {"tensors": 0, "elements": 0, "bytes": 0, "pages": 0},
        )
        entry["tensors"] += 1
        entry["elements"] += tensor.nbytes // tensor.dtype.itemsize
        entry["bytes"] += tensor.nbytes
        entry["pages"] += len(tensor.pages)
    matrix_pages = [page for tensor in tensors.values() if tensor.kind == "matrix" for page in tensor.pages]
    reads: list[dict[str, Any]] = [
        {
            "name": name,
            "clock": clock,
            "bytes": tensors[name].nbytes,
            "pages": len(tensors[name].pages),
            "transposed": tensors[name].transposed,
        }
        for name, clock in (*walk.clocked, *((name, 1) for name in head))
    ]
    average = sum(read["bytes"] / read["clock"] for read in reads)
    return {
        "path": str(store.path),
        "format": store.format,
        "model_type": store.model_type,
        "config": config.to_dict(),
        "files": [{"path": str(file), "bytes": file.stat().st_size} for file in store.files],
        "tokenizer": store.tokenizer_json is not None,
        "parameters": sum(block.numel for block in blocks),
        "unused_parameters": sum(block.numel for block in blocks if block.kind == "unused"),
        "kinds": [{"kind": kind, "dtype": dtype, **entry} for (kind, dtype), entry in kinds.items()],
        "tensors": [
            {
                "name": name,
                "kind": t.kind,
                "dtype": str(t.dtype).removeprefix("torch."),
                "shape": list(t.shape),
                "group": t.group,
                "transposed": t.transposed,
                "bytes": t.nbytes,
                "pages": len(t.pages),
            }
            for name, t in tensors.items()
        ],
        "pages": {
            "count": len(store.pages),
            "matrix_pages": len(matrix_pages),
            "least_matrix_page": min(page.nbytes for page in matrix_pages),
            "largest_matrix_page": max(page.nbytes for page in matrix_pages),
            "aligned": sum(page.offset % ALIGNMENT == 0 for page in matrix_pages),
            "checksums": sum(page.crc is not None for page in store.pages),
        },
        "schedule": {
            "period": walk.period,
            "reads": reads,
            "head": list(head),
            "bytes_per_token": average,
            "bytes_per_period": round(average * walk.period),
            "largest_step_bytes": sum(read["bytes"] for read in reads),
            "least_step_bytes": sum(read["bytes"] for read in reads if read["clock"] == 1),
        },
        "state_bytes": state.nbytes,
        "state_context": state.context if "context" in model.state_options else None,
    }


def describe(summary: dict[str, Any]) -> str:
    """The summary for people."""
    pages, schedule = summary["pages"], summary["schedule"]
    files = summary["files"]
    unused = f", {summary['unused_parameters']:,} of them unused" if summary["unused_parameters"] else ""
    checked = "all with checksums" if pages["checksums"] == pages["count"] else f"{pages['checksums']} with checksums"
    sections = [
        table(
            [
                ("checkpoint", summary["path"]),
                ("model", f"{summary['model_type']}, {summary['parameters']:,} parameters{unused}"),
                (
                    "format",
                    f"{summary['format']}, {len(files)} file{'s' * (len(files) > 1)}, "
                    f"{size(sum(file['bytes'] for file in files))}",
                ),
                ("tokenizer", "yes" if summary["tokenizer"] else "none"),
                (
                    "state",
                    f"{size(summary['state_bytes'])} for a sequence of "
                    + (f"{summary['state_context']} tokens" if summary["state_context"] else "any length"),
                ),
                (
                    "pages",
                    f"{pages['count']}, {checked}; {pages['matrix_pages']} of matrices, "
                    f"{size(pages['least_matrix_page'])} to {size(pages['largest_matrix_page'])}, "
                    f"{pages['aligned']} aligned to {ALIGNMENT}",
                ),
            ]
        ),
        table(
            [
                ("config", ""),
                *((f"  {name}", str(value)) for name, value in summary["config"].items() if name != "model_type"),
            ]
        ),
        table(
            [("kind", "dtype", "tensors", "elements", "size", "pages")]
            + [
                (e["kind"], e["dtype"], str(e["tensors"]), f"{e['elements']:,}", size(e["bytes"]), str(e["pages"]))
                for e in summary["kinds"]
            ]
        ),
        table(
            [("schedule, in order", "every", "size", "pages", "")]
            + [
                (
                    e["name"],
                    f"{e['clock']} steps" if e["clock"] > 1 else "step",
                    size(e["bytes"]),
                    str(e["pages"]),
                    "stored by columns" if e["transposed"] else "",
                )
                for e in schedule["reads"]
            ]
        ),
        table(
            [
                (
                    "bytes per token",
                    f"{size(schedule['bytes_per_token'])} on average, from "
                    f"{size(schedule['least_step_bytes'])} to {size(schedule['largest_step_bytes'])}",
                ),
                ("bytes per period", f"{size(schedule['bytes_per_period'])} in {schedule['period']} steps"),
            ]
        ),
    ]
    return "\n\n".join(sections)


def verify(store: Store, progress: Progress | None = None) -> int:
    """Reads every page once and checks its checksum. Returns the bytes read.

    Raises CheckpointError that names the first page that cannot be read or is damaged.
    """
    slot = max((extent(page)[1] for page in store.pages), default=ALIGNMENT)
    arena = Arena(max(SLOTS * slot, ALIGNMENT))
    total, done = sum(page.nbytes for page in store.pages), 0
    flying: deque[tuple[int, int]] = deque()
    with Reader(store.files) as reader:
        for number, page in enumerate(store.pages):
            if len(flying) == SLOTS:
                done += _landed(reader, flying)
                if progress:
                    progress(done, total)
            flying.append(
                (
                    page.nbytes,
                    reader.submit(
                        page.file,
                        page.offset,
                        page.nbytes,
                        arena,
                        number % SLOTS * slot,
                        crc=page.crc,
                        label=label(page),
                    ),
                )
            )
        while flying:
            done += _landed(reader, flying)
    return done


def _landed(reader: Reader, flying: deque[tuple[int, int]]) -> int:
    nbytes, ticket = flying.popleft()
    reader.wait(ticket)
    return nbytes
