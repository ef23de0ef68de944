"""Metrics of attribution maps. Importing the package registers all of them."""

import attrbox.metrics.complexity
import attrbox.metrics.faithfulness.axioms
import attrbox.metrics.faithfulness.curves
import attrbox.metrics.faithfulness.road
import attrbox.metrics.localization.pointing
import attrbox.metrics.robustness.sanity
import attrbox.metrics.robustness.sensitivity  # noqa: F401
