"""Names of what stages write layer by layer: folders of the run directory."""

QUANTIZED_WEIGHTS = "quantized_weights"
CALIBRATED_ROUTERS = "calibrated_routers"
TOP_ANY_ROUTER = "top_any_router"
