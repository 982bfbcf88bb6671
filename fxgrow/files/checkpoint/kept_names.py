"""Names of other libraries' data that a pickle may hold: each by its module and what it is there.

Every one is written out: a module holds more than what it defines, and a package more than what a
checkpoint may name. None of them is looked up, imported or called here, but whoever loads what
fxgrow writes does so; :mod:`fxgrow.files.checkpoint.kept_checks` says of what they may be made.
"""

from __future__ import annotations

from collections.abc import Mapping


def _full(homes: Mapping[str, str]) -> frozenset[str]:
    """Return full names, given those of each module as one text."""
    return frozenset(f"{home}.{name}" for home, names in homes.items() for name in names.split())


_PATHS = "PosixPath WindowsPath PurePosixPath PureWindowsPath Path PurePath"
PATHS = _full({"pathlib": _PATHS, "pathlib._local": _PATHS})
TIMES = _full({"datetime": "datetime date time timedelta timezone"})

BIT_GENERATORS = {
    "MT19937": "numpy.random._mt19937.MT19937",
    "PCG64": "numpy.random._pcg64.PCG64",
    "PCG64DXSM": "numpy.random._pcg64.PCG64DXSM",
    "Philox": "numpy.random._philox.Philox",
    "SFC64": "numpy.random._sfc64.SFC64",
}
BIT_GENERATOR = "numpy.random._pickle.__bit_generator_ctor"
GENERATORS = _full({"numpy.random._pickle": "__randomstate_ctor __generator_ctor"})
SEEDS = "numpy.random.bit_generator.__pyx_unpickle_SeedSequence"
SEED_SEQUENCE = "numpy.random.bit_generator.SeedSequence"

ENUMS = _full(
    {
        "torchvision.transforms.autoaugment": "AutoAugmentPolicy",
        "torchvision.transforms.functional": "InterpolationMode",
    }
)
# What a pickle calls to make a value.
CALLED = (
    PATHS
    | TIMES
    | GENERATORS
    | ENUMS
    | {BIT_GENERATOR, SEEDS}
    | _full(
        {
            "builtins": "range slice",
            "collections": "deque",
            "decimal": "Decimal",
            "fractions": "Fraction",
            "functools": "partial",
            "types": "SimpleNamespace",
        }
    )
)

YACS = _full(
    {
        "detectron2.config.config": "CfgNode",
        "fvcore.common.config": "CfgNode",
        "yacs.config": "CfgNode",
    }
)
# Dicts whose ``__new__`` and state are given what they hold once more.
ADDICTS = _full(
    {
        "addict.addict": "Dict",
        "mmcv.utils.config": "ConfigDict",
        "mmengine.config.config": "ConfigDict",
    }
)
BOX_LIST = "box.box_list.BoxList"
BOXES = frozenset({"box.box.Box", BOX_LIST})
MAPPINGS = YACS | _full(
    {
        "easydict": "EasyDict",
        "lightning.fabric.utilities.data": "AttributeDict",
        "lightning.pytorch.utilities.parsing": "AttributeDict",
        "lightning_fabric.utilities.data": "AttributeDict",
        "munch": "Munch",
        "pytorch_lightning.utilities.parsing": "AttributeDict",
    }
)
CONFIG_DICT = "ml_collections.config_dict.config_dict.ConfigDict"
FROZEN_CONFIG_DICT = "ml_collections.config_dict.config_dict.FrozenConfigDict"
METADATA = _full({"omegaconf.base": "Metadata ContainerMetadata"})
CONFIGURATIONS = _full(
    {
        "omegaconf.base": "UnionNode",
        "omegaconf.dictconfig": "DictConfig",
        "omegaconf.listconfig": "ListConfig",
        "omegaconf.nodes": "AnyNode StringNode PathNode IntegerNode BytesNode FloatNode "
        "BooleanNode NoneNode EnumNode",
    }
)
SCALERS = _full(
    {
        "sklearn.preprocessing._data": "Binarizer KernelCenterer MaxAbsScaler MinMaxScaler "
        "Normalizer PowerTransformer QuantileTransformer RobustScaler StandardScaler",
        "sklearn.preprocessing._discretization": "KBinsDiscretizer",
        "sklearn.preprocessing._encoders": "OneHotEncoder OrdinalEncoder",
        "sklearn.preprocessing._label": "LabelBinarizer LabelEncoder MultiLabelBinarizer",
        "sklearn.preprocessing._polynomial": "PolynomialFeatures SplineTransformer",
        "sklearn.preprocessing._target_encoder": "TargetEncoder",
    }
)
# Without those that hold a function (``Lambda``).
TRANSFORMS = _full(
    {
        "torchvision.transforms._presets": "ImageClassification VideoClassification "
        "ObjectDetection SemanticSegmentation OpticalFlow",
        "torchvision.transforms.autoaugment": "AutoAugment RandAugment TrivialAugmentWide AugMix",
        "torchvision.transforms.transforms": "Compose ToTensor PILToTensor ConvertImageDtype "
        "ToPILImage Normalize Resize CenterCrop Pad RandomApply RandomOrder RandomChoice "
        "RandomCrop RandomHorizontalFlip RandomVerticalFlip RandomPerspective RandomResizedCrop "
        "FiveCrop TenCrop LinearTransformation ColorJitter RandomRotation RandomAffine Grayscale "
        "RandomGrayscale RandomErasing GaussianBlur RandomInvert RandomPosterize RandomSolarize "
        "RandomAdjustSharpness RandomAutocontrast RandomEqualize ElasticTransform",
        "torchvision.transforms.v2._augment": "RandomErasing MixUp CutMix JPEG",
        "torchvision.transforms.v2._auto_augment": "AutoAugment RandAugment TrivialAugmentWide "
        "AugMix",
        "torchvision.transforms.v2._color": "Grayscale RandomGrayscale RGB ColorJitter "
        "RandomChannelPermutation RandomPhotometricDistort RandomEqualize RandomInvert "
        "RandomPosterize RandomSolarize RandomAutocontrast RandomAdjustSharpness",
        "torchvision.transforms.v2._container": "Compose RandomApply RandomChoice RandomOrder",
        "torchvision.transforms.v2._deprecated": "ToTensor",
        "torchvision.transforms.v2._geometry": "RandomHorizontalFlip RandomVerticalFlip Resize "
        "CenterCrop RandomResizedCrop FiveCrop TenCrop Pad RandomZoomOut RandomRotation "
        "RandomAffine RandomCrop RandomPerspective ElasticTransform RandomIoUCrop ScaleJitter "
        "RandomShortestSize RandomResize",
        "torchvision.transforms.v2._meta": "ConvertBoundingBoxFormat ClampBoundingBoxes",
        "torchvision.transforms.v2._misc": "Identity LinearTransformation Normalize GaussianBlur "
        "GaussianNoise ToDtype ConvertImageDtype SanitizeBoundingBoxes",
        "torchvision.transforms.v2._temporal": "UniformTemporalSubsample",
        "torchvision.transforms.v2._type_conversion": "PILToTensor ToImage ToPILImage ToPureTensor",
    }
)
UUID = "uuid.UUID"
# Classes of which a pickle makes empty instances, which it then fills.
MADE = frozenset((
    *MAPPINGS, *ADDICTS, *BOXES, CONFIG_DICT, FROZEN_CONFIG_DICT, *METADATA, *CONFIGURATIONS,
    *SCALERS, *TRANSFORMS, UUID,
))  # fmt: skip

# Names that stand for themselves: types, of what something is or is to be made.
VALUES = BOXES | _full(
    {
        "builtins": "bool dict float int list object str tuple",
        "numpy": "ndarray bool_ float16 float32 float64 int8 int16 int32 int64 uint8 uint16 "
        "uint32 uint64",
        "typing": "Any",
        "torch.optim": "Adadelta Adafactor Adagrad Adam AdamW Adamax ASGD LBFGS Muon NAdam RAdam "
        "RMSprop Rprop SGD SparseAdam",
        "torch.optim._adafactor": "Adafactor",
        "torch.optim._muon": "Muon",
        "torch.optim.adadelta": "Adadelta",
        "torch.optim.adagrad": "Adagrad",
        "torch.optim.adam": "Adam",
        "torch.optim.adamax": "Adamax",
        "torch.optim.adamw": "AdamW",
        "torch.optim.asgd": "ASGD",
        "torch.optim.lbfgs": "LBFGS",
        "torch.optim.lr_scheduler": "LRScheduler _LRScheduler LambdaLR MultiplicativeLR StepLR "
        "MultiStepLR ConstantLR LinearLR ExponentialLR SequentialLR PolynomialLR "
        "CosineAnnealingLR ChainedScheduler ReduceLROnPlateau CyclicLR "
        "CosineAnnealingWarmRestarts OneCycleLR",
        "torch.optim.nadam": "NAdam",
        "torch.optim.optimizer": "Optimizer",
        "torch.optim.radam": "RAdam",
        "torch.optim.rmsprop": "RMSprop",
        "torch.optim.rprop": "Rprop",
        "torch.optim.sgd": "SGD",
        "torch.optim.sparse_adam": "SparseAdam",
        "torch.optim.swa_utils": "SWALR",
    }
)
# Types that only the arguments of a call may be.
ARGUMENTS = frozenset({*BIT_GENERATORS.values(), SEED_SEQUENCE})
