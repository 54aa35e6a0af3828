"""Knows methods of other programs that flexmerge lacks: what each one is, and which method here is nearest.

These are FusionBench's methods, under the names of its folders and configurations, and those of mergekit that
aliases.py lacks. Needs no torch.
"""

_SAME = "has another name here"
_MIXES = (
    "mixes the tasks' weights for each input with a router that is trained on data, as `wemoe` of `flexmerge tune` does"
)
_WEMOE = "flexmerge tune plan.json --spec calib.yaml --method wemoe --bundle bundle/ -o mixed/"
_PRUNES = "prunes the weights of a single model"
_MOE = "builds a mixture of experts, or prunes one"
_MODELS = "runs several models and combines their outputs: `curve --ensembles` scores that beside merges"
_ENSEMBLES = "flexmerge curve plan.json --spec eval.yaml --ensembles --method average"
_TUNE = (
    "flexmerge tune plan.json --spec calib.yaml --method {} -o coefficients.json, then --method "
    "weighted_average:weights=@coefficients.json,normalize=count"
)
_TWO = "interpolates on a sphere or by rules of its own between the weights themselves, not task vectors"

# Name -> (what it is, the nearest method here as options of `merge`, commands that do it, or nothing).
ABSENT = {
    "regmean_pp": (
        "is `regmean` with the inputs that come through the merged layers below, which `calibrate --through` measures",
        "flexmerge calibrate plan.json --spec calib.yaml --through regmean --size 1x -o through/, then "
        "--method regmean --calibration through/ --size 1x",
    ),
    "adamerging": (
        "is a method of `flexmerge tune`, which learns a weight per task and block from unlabelled examples",
        _TUNE.format("adamerging"),
    ),
    "wemoe": (
        "is a method of `flexmerge tune`, which adds to a bundle of `smile` routers that weigh its experts for each "
        "input, trained on unlabelled examples",
        _WEMOE,
    ),
    "pwe_moe": ("trains a router that goes along the Pareto front of the tasks: needs data", "emr"),
    "sparse_wemoe": (_MIXES, _WEMOE),
    "dawe": (_MIXES, _WEMOE),
    "rankone_moe": (f"{_MIXES} with experts of `smile:rank=1`", _WEMOE),
    "ada_svd": ("averages the experts of SMILE by its routing weights: needs data", "smile"),
    "surgery": (
        "is a method of `flexmerge tune`, which adds to a bundle a small correction per task of what its last layer "
        "gets, learnt from unlabelled examples",
        "flexmerge tune plan.json --spec calib.yaml --method surgery:rank=16 --bundle bundle/ -o corrected/",
    ),
    "concrete": (
        "is a method of `flexmerge tune`, which learns a mask of blocks, not of elements, from unlabelled examples",
        _TUNE.format("concrete"),
    ),
    "concrete_tsvm": ("learns a mask of a subspace before TSV-Merge: needs data", "tsv_m"),
    "doge_ta": ("minimises what the tasks lose by projected gradients of the task vectors", "wudi"),
    "dop": ("merges one task after the other by projections in two directions", "opcm"),
    "gossip": ("merges neighbours among the tasks again and again", "average"),
    "fw_merging": (
        "is a method of `flexmerge tune`, which steps towards models that the gradients on unlabelled examples choose",
        _TUNE.format("fw_merging"),
    ),
    "trust_region": ("leaves out what conflicts, judged by gradients of the tasks' losses: needs data", "ties"),
    "knots": ("aligns LoRA updates in the basis of their joint SVD, then merges them as TIES", "tsv_m"),
    "expo": ("extrapolates beyond one aligned model", "task_arithmetic:scale=1.5"),
    "model_recombination": ("shuffles layers between the models at random", "average"),
    "simple_ensemble": (_MODELS, _ENSEMBLES),
    "weighted_ensemble": (_MODELS, _ENSEMBLES),
    "max_model_predictor": (_MODELS, _ENSEMBLES),
    "depth_upscaling": ("stacks copies of layers to a deeper model", ""),
    "mixtral_moe": (_MOE, ""),
    "moe_pruner": (_MOE, ""),
    "expert_sparsity": (_MOE, ""),
    "sparselo": (_PRUNES, "sparse"),
    "wanda": (_PRUNES, "sparse"),
    "sparsegpt": (_PRUNES, "sparse"),
    "random_pruning": (_PRUNES, "average --step dare:rescale=false"),
    "magnitude_pruning": (_PRUNES, "sparse"),
    "slerp": (_TWO, "weighted_average"),
    "nuslerp": (_TWO, "weighted_average"),
    "multislerp": (_TWO, "weighted_average"),
    "karcher": (_TWO, "average"),
    "nearswap": (_TWO, "weighted_average"),
    "arcee_fusion": ("takes over what changed most of a second model", "magmax"),
    "passthrough": ("copies one model's tensors", "average --method-for '*=keep'"),
    "cabs": ("prunes the tasks one after the other, so that they do not overlap", "ties"),
    "core_space": ("merges LoRA updates in a basis that they share", "tsv_m"),
    "ram": ("averages what several tasks changed, and keeps what a single one did", "consensus_original"),
    "smile_upscaling": (_SAME, "smile"),
    "task_vector_cos_similarity": ("is a table of a plan: the cosines of its tasks", "flexmerge inspect plan.json"),
    "simple_average": (_SAME, "average"),
    "dare_simple_average": (_SAME, "average --step dare"),
    "dare_ties_merging": (_SAME, "ties --step dare"),
    "wudi_merging": (_SAME, "wudi"),
    "fisher_merging": (_SAME, "fisher"),
    "linear_interpolation": (_SAME, "weighted_average"),
    "ties_merging": (_SAME, "ties"),
    "emr_merging": (_SAME, "emr"),
    "tall_mask": (_SAME, "tall_masks"),
    "superposed_task_arithmetic": (_SAME, "randes"),
    "weighted_averaging": (_SAME, "weighted_average"),
    "dare_task_arithmetic": (_SAME, "task_arithmetic --step dare"),
    "consensus_ta": (_SAME, "consensus_original"),
    "task_singular_vector": (_SAME, "tsv_m"),
    "isotropic_merging": (_SAME, "iso_c"),
    "singular_value_calibration": (_SAME, "task_arithmetic --calibrate svc"),
    "magnitude_diff_pruning": (_SAME, "sparse:centre=base,select=row"),
}

_OTHER_NAMES = {
    "regmean_plusplus": "regmean_pp",
    "regmean++": "regmean_pp",
    "task_wise_adamerging": "adamerging",
    "layer_wise_adamerging": "adamerging",
    "we_moe": "wemoe",
    "weight_ensembling_moe": "wemoe",
    "sparse_we_moe": "sparse_wemoe",
    "sparse_weight_ensembling_moe": "sparse_wemoe",
    "singular_projection_merging": "smile_upscaling",
    "adamerging_surgery": "surgery",
    "representation_surgery": "surgery",
    "concrete_subspace": "concrete",
    "concrete_task_arithmetic": "concrete",
    "concrete_adamerging": "concrete",
    "concrete_task_wise_adamerging": "concrete",
    "concrete_layer_wise_adamerging": "concrete",
    "doge": "doge_ta",
    "frank_wolfe": "fw_merging",
    "frank_wolfe_merging": "fw_merging",
    "fw_hard": "fw_merging",
    "fw_soft": "fw_merging",
    "ensemble": "simple_ensemble",
    "max_predictor": "max_model_predictor",
    "simple_averaging": "simple_average",
    "layer_recombination": "model_recombination",
    "moe_based_merging": "mixtral_moe",
    "moe_based_upscaling": "mixtral_moe",
    "mixture_of_experts": "mixtral_moe",
    "mixtral_moe_merging": "mixtral_moe",
    "mixtral_moe_upscaling": "mixtral_moe",
    "mixtral_upscaling": "mixtral_moe",
    "moe_upscaling": "mixtral_moe",
    "pruning": "magnitude_pruning",
    "sparselo_pruning": "sparselo",
    "tsvm": "task_singular_vector",
}


def explain_absent(name: str) -> tuple[str, str] | None:
    """Explain a method that flexmerge lacks, with a hint at the nearest one, `use --method …`; None for unknown names.

    Case, `-`, and FusionBench's `clip_` in front do not matter.
    """
    key = name.lower().replace("-", "_").removeprefix("clip_")
    found = ABSENT.get(_OTHER_NAMES.get(key, key))
    if found is None:
        return None
    what, nearest = found
    if nearest.startswith("flexmerge "):
        return what, nearest
    if not nearest:
        return what, "`flexmerge methods` lists and explains the methods here"
    return what, f"{'write' if what == _SAME else 'the nearest here is'} --method {nearest}"
