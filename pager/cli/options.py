"""Options that several commands share, with the words that explain them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint folder, as downloaded or packed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
ExpertMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory for routed experts: '64MiB', bytes, or a share of all of them ('25%'). "
        "Default: what the machine has.",
        metavar="SIZE",
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option(help="Host tier behind the slots: a size, or a share of all experts; 0 for none.", metavar="SIZE"),
]
KvMemory = Annotated[str | None, typer.Option(help="Memory for keys and values.", metavar="SIZE")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: a GPU where there is one.", metavar="NAME")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Serve in bfloat16 (default), float16, float32, or auto: as the checkpoint says.", metavar="NAME"
    ),
]
Pool = Annotated[
    str | None,
    typer.Option(
        help="How many experts the request may use: a number a layer (32), a share of all ('12.5%'), the router mass "
        "to cover ('mass:0.9', or 'mass:0.9:48' with a cap), or 'full'.",
        metavar="SIZE",
    ),
]
