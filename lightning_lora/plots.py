"""An empty figure to draw on, where matplotlib is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def empty_figure(drawn_by: str, width: float, height: float) -> Figure:
    """Return a figure that does not belong to pyplot, which would choose a backend for the whole process.

    Args:
        drawn_by: What asks for it, for the message.
        width: In inches.
        height: In inches.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(f"{drawn_by} draws with matplotlib: pip install 'lightning-lora[plots]'") from None
    return Figure(figsize=(width, height), layout="constrained")
