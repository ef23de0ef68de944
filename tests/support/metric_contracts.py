"""All metrics, with options that make them quick."""

from nets import images, relu_net

import attrbox

METRICS = attrbox.list_metrics()


QUICK = {
    "label_randomization": {"other": relu_net(seed=5)},
    "cascading_randomization": {"steps": 2},
    "independent_randomization": {"steps": 2},
    "sensitivity_max": {"n_samples": 2},
    "completeness": {"baseline": 0.0},
    "infidelity": {"n_samples": 6},
    "sensitivity_n": {"n_samples": 5, "fractions": (0.3, 0.6)},
    "insertion": {"steps": 4},
    "deletion": {"steps": 4},
    "road": {"fractions": (0.3, 0.6), "score": "prob"},
    "road_lerf": {"fractions": (0.3, 0.6), "score": "prob"},
    "morf": {"fraction": 0.3, "steps": 3, "fill": "noise", "relative": False},
    "lerf": {"fraction": 0.3, "steps": 3, "relative": False},
}


MASKS = images(4, 8, 8, seed=4) > 0.3
