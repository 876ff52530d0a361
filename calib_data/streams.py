"""Opens datasets of the Hub and local tables, of which rows come one at a time."""

from typing import Any


def open_dataset(name: str, config: str | None = None, **options: Any) -> Any:
    """Call `datasets.load_dataset` with streaming, and without telling anybody.

    The library counts what is opened at a server of its own, local files too.

    Args:
        name: A dataset of the Hub, or a builder of local files (``parquet``, ``json``).
        config: Of the dataset.
        options: As `datasets.load_dataset` takes them.

    Raises:
        Exception: whatever the network, the Hub or a builder raises.
    """
    import datasets.config

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return datasets.load_dataset(name, config, streaming=True, **options)
