"""Names of the baselines, which planning knows without importing what makes them."""

__all__ = ["BASELINES", "COLOR"]

# What every model must be better than: the function that makes it, None for the starting weights' own architecture.
BASELINES = {
    "random": None,
    "color-histogram": "dinoscope.evaluate.baseline_encoders:color_histogram",
    "thumbnail": "dinoscope.evaluate.baseline_encoders:thumbnail",
}
COLOR = "color-histogram"  # what colour alone tells
