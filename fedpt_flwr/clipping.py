"""What a device does where it clips its own change: Flower's modifiers, by the run config.

``privacy.dp = client-fixed`` or ``client-adaptive``: the last thing that happens to a reply before it leaves. The norm
comes with the message; the server checks that it was kept to.
"""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable

from fedpt_flwr.records import ARRAYS, in_type

_MODS = {"client-fixed": fixedclipping_mod, "client-adaptive": adaptiveclipping_mod}


def clip_update(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A modifier of the ClientApp: clip the change in the reply, if the run is one in which devices do so.

    Args:
        message: What the server sent.
        context: Of the device.
        call_next: Makes the reply.
    """
    reply = call_next(message, context)
    mod = _MODS.get(str(context.run_config.get("privacy.dp")))
    if mod is None or reply.has_error() or ARRAYS not in reply.content.array_records:
        return reply
    sent, tuned = message.content.array_records[ARRAYS], reply.content.array_records[ARRAYS]
    # Flower takes arrays by their place, not by their name, and sums squares in their type: in float32 the norm of
    # millions of them is off by up to a thousandth, and so would be that of the clipped change.
    reply.content[ARRAYS] = in_type(ArrayRecord({name: tuned[name] for name in sent}), "float64")
    clipped = mod(message, context, lambda *_: reply)
    if clipped.has_content():
        clipped.content[ARRAYS] = in_type(clipped.content.array_records[ARRAYS], "float32")
    return clipped
