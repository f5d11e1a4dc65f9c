"""Whether the hub answers, asked at once: its client would ask for a minute, file by file, without a network."""

from __future__ import annotations

import sys
from functools import cache

ATTEMPTS = 2


@cache
def look_for_hub() -> None:
    """If nothing answers at the hub's address, say so and go by what was fetched before."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return
    for _ in range(ATTEMPTS):
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return
        except Exception as error:  # of the client that this client is made with
            reason = str(error) or type(error).__name__
    print(
        f"{constants.ENDPOINT}: nothing answers there ({reason}), so what was fetched before is all there"
        " is",
        file=sys.stderr,
    )
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # it has a copy
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
