"""Attribution methods. Importing the package registers all of them."""

import attrbox.methods.cam.attention_rollout
import attrbox.methods.cam.grad_cam
import attrbox.methods.gradient.integrated_gradients
import attrbox.methods.gradient.saliency
import attrbox.methods.gradient.smoothgrad
import attrbox.methods.learned.method
import attrbox.methods.learned.transfer
import attrbox.methods.masking.extremal_perturbation
import attrbox.methods.masking.meaningful_perturbation
import attrbox.methods.perturbation.kernel_shap
import attrbox.methods.perturbation.lime
import attrbox.methods.perturbation.occlusion
import attrbox.methods.perturbation.rise
import attrbox.methods.propagation.lrp_composites
import attrbox.methods.propagation.pattern_attribution
import attrbox.methods.propagation.rule_methods
import attrbox.methods.random_map  # noqa: F401
