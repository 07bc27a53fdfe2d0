"""The connector file of stage 1; it is read with adapters, too, and therefore lives beside the model."""

from metamorph.models.connector import (
    CONNECTOR_FILE,
    CONNECTOR_FILES,
    Connector,
    find_connector,
    is_full_model,
    load_connector,
    read_connector,
    save_connector,
)


__all__ = [
    "CONNECTOR_FILE",
    "CONNECTOR_FILES",
    "Connector",
    "find_connector",
    "is_full_model",
    "load_connector",
    "read_connector",
    "save_connector",
]
