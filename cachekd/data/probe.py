"""What an encoder makes of a fixed text: tokenizer, chat template and processor at work together.

Each of them can be what it was, and the token ids be others all the same: whether the tokenizer adds a BOS
token that the template leaves out is decided by who calls it.
"""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from cachekd.data.encode import SampleEncoder
from cachekd.data.render import Messages
from cachekd.data.sample import Sample
from cachekd.data.supervision import takes_suffix
from cachekd.errors import CachekdError

# Never to be changed: caches hold a fingerprint of what became of it.
CONVERSATION: Messages = tuple(
    {"role": role, "content": [{"type": "text", "text": text}]}
    for role, text in (
        ("user", "What is the color of the shape? Answer in one word."),
        ("assistant", "Red"),
        ("user", "How many are there,\nand is one of them (say) 3.5 times as large?"),
        ("assistant", "There are 12; no, it is not."),
    )
)


def probe_encoding(encoder: SampleEncoder) -> tuple[Tensor, Tensor] | None:
    """Encode the conversation without images; of one that needs them, the first question with a black one.

    Returns:
        [L] int64 token ids and [L] bool what is supervised, image placeholders left out; None where the
        chat template or the processor refuses the conversation.
    """
    encoder = encoder.without_limits()  # which are no part of how text becomes tokens
    if takes_suffix(encoder.processor):
        sample = Sample("probe", (Image.new("RGB", (8, 8)),), tuple(CONVERSATION[:2]), "a probe text")
    else:
        sample = Sample("probe", (), tuple(CONVERSATION), "a probe text")
    try:
        encoded = encoder(sample)
    except CachekdError:
        return None
    ids = encoded.inputs["input_ids"]
    if not sample.images:
        return ids, encoded.supervised
    is_text = ids != encoder.image_token_id
    return ids[is_text], encoded.supervised[is_text]
