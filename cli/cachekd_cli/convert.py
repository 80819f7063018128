"""`cachekd convert`: a TinyLLaVA checkpoint as a Llava folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachekd_cli.console import say


def convert_command(
    source: Annotated[Path, typer.Argument(help="A folder in TinyLLaVA Factory's layout.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new model's folder.")],
) -> None:
    """Write a TinyLLaVA checkpoint as an ordinary Llava, which every command here takes.

    SigLIP or CLIP encoder, two-layer projector, any causal language model that transformers has. The
    checkpoint's own code is not run.

    Example: cachekd convert models/TinyLLaVA-Phi-2-SigLIP-3.1B -o models/tinyllava-3.1b
    """
    from cachekd.models.tinyllava import convert_tinyllava

    model = convert_tinyllava(source, out)
    text, vision = model.config.text_config, model.config.vision_config
    say(f"{out}: a Llava with {vision.model_type} and {text.model_type}")
