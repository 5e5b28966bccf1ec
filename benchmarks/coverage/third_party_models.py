"""Models of other libraries for third_party.py: how each is made, without a download, and what it runs on.

The key is LIBRARY/NAME. Nothing is imported before a model of its library is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LIBRARIES = {  # by the prefix of the key: the module to import, and the distribution whose version is reported
    "smp": ("segmentation_models_pytorch", "segmentation-models-pytorch"),
    "monai": ("monai.networks.nets", "monai"),
    "torchvision": ("torchvision.models", "torchvision"),
    "transformers": ("transformers", "transformers"),
    "ultralytics": ("ultralytics.nn.tasks", "ultralytics"),
    "effdet": ("effdet", "effdet"),
    "open_clip": ("open_clip", "open_clip_torch"),
    "torchreid": ("torchreid", "torchreid"),
    "facenet": ("facenet_pytorch", "facenet-pytorch"),
    "kornia": ("kornia.feature", "kornia"),
    "torchaudio": ("torchaudio.models", "torchaudio"),
    "pytorchvideo": ("pytorchvideo.models.hub", "pytorchvideo"),
    "lightly": ("lightly.models.modules", "lightly"),
}


@dataclass(frozen=True)
class Model:
    """make(library) builds it; inputs(seed) is what convert takes as example_input; targets go with it in training."""

    make: Callable[[Any], nn.Module]
    inputs: Callable[[int], Any]
    train_inputs: Callable[[int], Any] | None = None
    part: str = ""  # whose outputs are compared after a fold, where those of the whole jump with the last bit
    in_double: bool = True  # whether the model runs in float64, as folds are compared; else they are in float32


def random(*shape: int) -> Callable[[int], Tensor]:
    return lambda seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def named(name: str, *shape: int, **others: Any) -> Callable[[int], dict[str, Any]]:
    """Keyword arguments: a random tensor under this name, and others as they are."""
    make = random(*shape)
    return lambda seed: {name: make(seed), **others}


def several(*shapes: tuple[int, ...]) -> Callable[[int], tuple[Any, ...]]:
    return lambda seed: tuple(random(*shape)(seed + i) for i, shape in enumerate(shapes))


def _smp() -> dict[str, Model]:
    def of(kind: str, encoder: str, batch: int = 1, size: int = 64, **options: Any) -> Model:
        return Model(
            lambda smp: getattr(smp, kind)(encoder, encoder_weights=None, classes=3, **options),
            random(batch, 3, size, size),
        )

    return {
        "Unet resnet18": of("Unet", "resnet18"),
        "Unet densenet121": of("Unet", "densenet121"),
        "Unet vgg11_bn": of("Unet", "vgg11_bn"),
        "Unet tu-regnetx_002": of("Unet", "tu-regnetx_002"),
        "Unet se_resnext50_32x4d": of("Unet", "se_resnext50_32x4d"),
        "UnetPlusPlus mobilenet_v2": of("UnetPlusPlus", "mobilenet_v2"),
        "MAnet resnet18": of("MAnet", "resnet18"),
        "Linknet efficientnet-b0": of("Linknet", "efficientnet-b0"),
        "FPN timm-efficientnet-lite0": of("FPN", "tu-tf_efficientnet_lite0"),
        "PSPNet resnet18": of("PSPNet", "resnet18"),
        "DeepLabV3 resnet18": of("DeepLabV3", "resnet18"),
        "DeepLabV3Plus tu-mobilenetv3_small_050": of("DeepLabV3Plus", "tu-mobilenetv3_small_050"),
        "PAN resnet18": of("PAN", "resnet18", size=128),
        "UPerNet resnet18": of("UPerNet", "resnet18"),
        "Segformer resnet18": of("Segformer", "resnet18"),
    }


def _monai() -> dict[str, Model]:
    volume, small, tiny = (random(1, 1, *[size] * 3) for size in (32, 64, 16))
    unet = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}

    def of(kind: str, inputs: Callable[[int], Any] = volume, **options: Any) -> Model:
        return Model(lambda nets: getattr(nets, kind)(**options), inputs)

    levels = {"channels": (8, 16, 32), "strides": (2, 2)}
    return {
        "UNet": of("UNet", **unet, **levels, num_res_units=2, norm="batch"),
        "UNet 2d": of("UNet", random(1, 1, 64, 64), **{**unet, "spatial_dims": 2}, **levels, norm="batch"),
        "BasicUNet": of("BasicUNet", **unet, features=(8, 8, 16, 16, 16, 8), norm="batch"),
        "BasicUNetPlusPlus": of("BasicUNetPlusPlus", **unet, features=(8, 8, 16, 16, 16, 8), norm="batch"),
        "AttentionUnet": of("AttentionUnet", **unet, **levels),
        "SegResNet": of("SegResNet", tiny, in_channels=1, out_channels=2, norm="batch"),
        "DynUNet": of("DynUNet", **unet, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2],
                      norm_name="batch", filters=[4, 8, 8]),
        "VNet": of("VNet"),
        "HighResNet": of("HighResNet", tiny, spatial_dims=3, in_channels=1, out_channels=2),
        "AHNet": of("AHNet", random(1, 1, 64, 64, 32), spatial_dims=3, in_channels=1, out_channels=2, psp_block_num=0),
        "UNETR": of("UNETR", in_channels=1, out_channels=2, img_size=(32, 32, 32), feature_size=8, hidden_size=48,
                    mlp_dim=64, num_heads=4, norm_name="batch"),
        "DenseNet121": of("DenseNet121", small, **unet),
        "SEResNet50": of("SEResNet50", small, spatial_dims=3, in_channels=1, num_classes=2),
        "resnet18": of("resnet18", small, spatial_dims=3, n_input_channels=1, num_classes=2),
        "EfficientNetBN": of("EfficientNetBN", model_name="efficientnet-b0", spatial_dims=3, in_channels=1,
                             num_classes=2, pretrained=False),
        "FlexibleUNet": of("FlexibleUNet", random(1, 3, 64, 64), in_channels=3, out_channels=2, spatial_dims=2,
                           backbone="efficientnet-b0"),
    }  # fmt: skip


def _torchvision() -> dict[str, Model]:
    bare = {"weights": None, "weights_backbone": None}
    small = {"num_classes": 3, "min_size": 128, "max_size": 128}

    def target(seed: int) -> dict[str, Tensor]:
        return {
            "boxes": torch.tensor([[10.0, 10, 60, 50], [30, 40, 120, 100]]), "labels": torch.tensor([1, 1]),
            "masks": torch.ones(2, 128, 128, dtype=torch.uint8), "keypoints": torch.full((2, 17, 3), 45.0),
        }  # fmt: skip

    def detector(name: str, batch: int = 1, **options: Any) -> Model:
        images = random(batch, 3, 128, 128)
        return Model(
            lambda models: models.get_model(name, **bare, **{**small, **options}),
            lambda seed: ([image.sigmoid() for image in images(seed)],),
            lambda seed: ([image.sigmoid() for image in images(seed)], [target(seed)] * batch),
            part="backbone",
        )

    def frozen(models: Any) -> nn.Module:
        norm = importlib.import_module("torchvision.ops.misc").FrozenBatchNorm2d
        utils = models.detection.backbone_utils
        backbone = utils.resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=5
        )
        return models.detection.FasterRCNN(backbone, **small)

    def of(name: str, inputs: Callable[[int], Any], **options: Any) -> Model:
        return Model(lambda models: models.get_model(name, weights=None, **options), inputs)

    image, clip = random(1, 3, 64, 64), random(1, 3, 8, 64, 64)
    none = {"weights_backbone": None, "num_classes": 3}
    flow = several((1, 3, 128, 128), (1, 3, 128, 128))
    return {
        "fasterrcnn_resnet50_fpn": detector("fasterrcnn_resnet50_fpn"),
        "fasterrcnn_resnet50_fpn_v2": detector("fasterrcnn_resnet50_fpn_v2"),
        "fasterrcnn_mobilenet_v3_large_320_fpn": detector("fasterrcnn_mobilenet_v3_large_320_fpn"),
        "FasterRCNN resnet18 FrozenBatchNorm2d": Model(frozen, *_two(detector("fcos_resnet50_fpn")), part="backbone"),
        "fcos_resnet50_fpn": detector("fcos_resnet50_fpn"),
        "retinanet_resnet50_fpn_v2": detector("retinanet_resnet50_fpn_v2"),
        "ssdlite320_mobilenet_v3_large": Model(
            lambda models: models.get_model("ssdlite320_mobilenet_v3_large", **bare, num_classes=3),
            *_two(detector("fcos_resnet50_fpn")), part="backbone",
        ),
        "maskrcnn_resnet50_fpn": detector("maskrcnn_resnet50_fpn"),
        "keypointrcnn_resnet50_fpn": detector("keypointrcnn_resnet50_fpn", num_classes=2),
        "fcn_resnet50": of("fcn_resnet50", image, **none, aux_loss=True),
        "deeplabv3_mobilenet_v3_large": of("deeplabv3_mobilenet_v3_large", image, **none),
        "lraspp_mobilenet_v3_large": of("lraspp_mobilenet_v3_large", image, **none),
        "r3d_18": of("r3d_18", clip),
        "mc3_18": of("mc3_18", clip),
        "r2plus1d_18": of("r2plus1d_18", clip),
        "s3d": of("s3d", random(1, 3, 16, 224, 224)),
        "raft_large": Model(lambda models: models.get_model("raft_large", weights=None), flow, in_double=False),
        "quantized_mobilenet_v2": of("quantized_mobilenet_v2", image, quantize=False),
        "quantized_mobilenet_v3_large": of("quantized_mobilenet_v3_large", image, quantize=False),
        "quantized_resnet18": of("quantized_resnet18", image, quantize=False),
        "quantized_shufflenet_v2_x0_5": of("quantized_shufflenet_v2_x0_5", image, quantize=False),
        "quantized_googlenet": of("quantized_googlenet", image, quantize=False, init_weights=True, aux_logits=False),
        "quantized_inception_v3": of("quantized_inception_v3", random(1, 3, 96, 96), quantize=False,
                                     init_weights=False, aux_logits=False),
    }  # fmt: skip


def _two(model: Model) -> tuple[Any, Any]:
    return model.inputs, model.train_inputs


def _transformers() -> dict[str, Model]:
    image = named("pixel_values", 1, 3, 64, 64)

    def of(kind: str, config: str, inputs: Callable[[int], Any] = image, **options: Any) -> Model:
        return Model(lambda t: getattr(t, kind)(getattr(t, config)(**options)), inputs)

    levit = {"hidden_sizes": [64, 96, 128], "num_attention_heads": [2, 3, 4], "key_dim": [16, 16, 16]}
    detr = {
        "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "encoder_layers": 1,
        "decoder_layers": 1, "d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5,
    }  # fmt: skip

    def with_resnet(kind: str, config: str, **options: Any) -> Model:
        def make(t: Any) -> nn.Module:
            names = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
            backbone = t.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", **names
            )
            return getattr(t, kind)(getattr(t, config)(backbone_config=backbone, **options))

        return Model(make, image)

    return {
        "ResNet": of("ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16],
                     depths=[2, 2]),
        "RegNet": of("RegNetForImageClassification", "RegNetConfig", embedding_size=8, hidden_sizes=[16, 32],
                     depths=[1, 2], groups_width=8),
        "MobileNetV1": of("MobileNetV1ForImageClassification", "MobileNetV1Config", depth_multiplier=0.25),
        "MobileNetV2": of("MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.35),
        "MobileNetV2 segmentation": of("MobileNetV2ForSemanticSegmentation", "MobileNetV2Config",
                                       depth_multiplier=0.35),
        "EfficientNet": of("EfficientNetForImageClassification", "EfficientNetConfig", width_coefficient=0.5,
                           depth_coefficient=0.5, hidden_dim=640),
        "LeViT": of("LevitForImageClassificationWithTeacher", "LevitConfig", image_size=64, **levit,
                    depths=[1, 1, 1]),
        "CvT": of("CvtForImageClassification", "CvtConfig", embed_dim=[16, 32, 48], num_heads=[1, 2, 3],
                  depth=[1, 2, 3]),
        "MobileViT": of("MobileViTForImageClassification", "MobileViTConfig", image_size=64),
        "MobileViTV2": of("MobileViTV2ForImageClassification", "MobileViTV2Config", width_multiplier=0.5),
        "SwiftFormer": of("SwiftFormerForImageClassification", "SwiftFormerConfig", image_size=64,
                          depths=[1, 1, 2, 1], embed_dims=[16, 24, 32, 48], drop_path_rate=0.0),
        "Segformer": of("SegformerForSemanticSegmentation", "SegformerConfig", depths=[1, 1, 1, 1],
                        hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=32),
        "DPT batch norm in residuals": of("DPTForDepthEstimation", "DPTConfig", image_size=64, hidden_size=32,
                                          num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
                                          backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 16, 24, 32],
                                          fusion_hidden_size=16, use_batch_norm_in_fusion_residual=True),
        "UperNet resnet": with_resnet("UperNetForSemanticSegmentation", "UperNetConfig", hidden_size=32,
                                      auxiliary_in_channels=24),
        "DETR resnet": with_resnet("DetrModel", "DetrConfig", **detr),
        "Wav2Vec2Conformer": of("Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig",
                                named("input_values", 2, 4000), hidden_size=32, num_hidden_layers=2,
                                num_attention_heads=2, intermediate_size=32, conv_dim=[16] * 7,
                                num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, layerdrop=0.0,
                                mask_time_prob=0.0),
        "PatchTST": of("PatchTSTForPrediction", "PatchTSTConfig", named("past_values", 2, 32, 3),
                       num_input_channels=3, context_length=32, d_model=16, num_attention_heads=2,
                       num_hidden_layers=2, ffn_dim=32, patch_length=4, patch_stride=4, prediction_length=4),
    }  # fmt: skip


def _ultralytics() -> dict[str, Model]:
    def of(kind: str, name: str, batch: int = 2) -> Model:
        return Model(lambda tasks: getattr(tasks, kind)(name, verbose=False), random(batch, 3, 64, 64))

    return {
        "yolov5n": of("DetectionModel", "yolov5n.yaml"),
        "yolov8n": of("DetectionModel", "yolov8n.yaml"),
        "yolov9t": of("DetectionModel", "yolov9t.yaml"),
        "yolov10n": of("DetectionModel", "yolov10n.yaml"),
        "yolo11n": of("DetectionModel", "yolo11n.yaml"),
        "yolov8n-seg": of("SegmentationModel", "yolov8n-seg.yaml"),
        "yolo11n-pose": of("PoseModel", "yolo11n-pose.yaml"),
        "yolo11n-obb": of("OBBModel", "yolo11n-obb.yaml"),
        "yolov8n-cls": of("ClassificationModel", "yolov8n-cls.yaml"),
    }


def _effdet() -> dict[str, Model]:
    def make(effdet: Any, name: str) -> nn.Module:
        config = effdet.get_efficientdet_config(name)
        config.image_size = (128, 128)
        return effdet.EfficientDet(config, pretrained_backbone=False)

    return {
        name: Model(lambda effdet, n=name: make(effdet, n), random(1, 3, 128, 128))
        for name in ("tf_efficientdet_lite0", "efficientdet_d0", "resdet50")
    }


def _open_clip() -> dict[str, Model]:
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    tokens = torch.arange(8).expand(2, 8)

    def make(open_clip: Any) -> nn.Module:
        return open_clip.CLIP(embed_dim=32, vision_cfg=open_clip.CLIPVisionCfg(**vision),
                              text_cfg=open_clip.CLIPTextCfg(**text))  # fmt: skip

    def with_timm(open_clip: Any) -> nn.Module:
        timm = open_clip.CLIPVisionCfg(
            image_size=64, timm_model_name="resnet18", timm_model_pretrained=False, timm_pool="", timm_proj="linear"
        )
        return open_clip.CLIP(embed_dim=32, vision_cfg=timm, text_cfg=open_clip.CLIPTextCfg(**text))

    return {
        "RN small": Model(make, named("image", 2, 3, 64, 64, text=tokens)),
        "timm resnet18": Model(with_timm, named("image", 2, 3, 64, 64, text=tokens)),
    }


def _torchreid() -> dict[str, Model]:
    def of(name: str, *size: int) -> Model:
        return Model(
            lambda torchreid: torchreid.models.build_model(name, 10, loss="softmax", pretrained=False),
            random(2, 3, *size),
        )

    return {  # hacnn makes tensors on a GPU
        "osnet_x0_25": of("osnet_x0_25", 128, 64),
        "resnet50_fc512": of("resnet50_fc512", 64, 32),
        "mlfn": of("mlfn", 128, 64),
        "pcb_p6": of("pcb_p6", 128, 64),
    }


def _facenet() -> dict[str, Model]:
    return {
        "InceptionResnetV1": Model(
            lambda facenet: facenet.InceptionResnetV1(classify=True, num_classes=10), random(2, 3, 96, 96)
        )
    }


def _kornia() -> dict[str, Model]:
    patches = random(4, 1, 32, 32)
    return {
        "HardNet": Model(lambda feature: feature.HardNet(pretrained=False), patches),
        "HardNet8": Model(lambda feature: feature.HardNet8(pretrained=False), patches),
        "SOSNet": Model(lambda feature: feature.SOSNet(pretrained=False), patches),
        "HyNet": Model(lambda feature: feature.HyNet(pretrained=False), patches),
        "KeyNet": Model(lambda feature: feature.KeyNet(pretrained=False), random(1, 1, 64, 64)),
        # of LoFTR what trains without matches that are known; DeDoDe's models cannot be copied, with or without CBN
        "LoFTR backbone": Model(lambda feature: feature.LoFTR(pretrained=None).backbone, random(1, 1, 64, 64)),
    }


def _torchaudio() -> dict[str, Model]:
    lengths = torch.tensor([20, 20])
    return {
        "Conformer": Model(
            lambda models: models.Conformer(16, 2, 32, 2, 7), lambda seed: (random(2, 20, 16)(seed), lengths)
        ),
        "WaveRNN": Model(
            lambda models: models.WaveRNN([2, 2, 3], 8, 12, n_res_block=2, n_rnn=16, n_fc=16, n_freq=10, n_hidden=8,
                                          n_output=8),
            several((2, 1, 12 * 6), (2, 1, 10, 10)),
        ),
        "Tacotron2": Model(
            lambda models: models.Tacotron2(n_mels=8, symbol_embedding_dim=16, encoder_embedding_dim=16,
                                            attention_rnn_dim=16, decoder_rnn_dim=16, postnet_embedding_dim=16,
                                            prenet_dim=16, attention_hidden_dim=8),
            lambda seed: (torch.arange(10).expand(2, 10), torch.tensor([10, 10]), random(2, 8, 12)(seed),
                          torch.tensor([12, 12])),
        ),
    }  # fmt: skip


def _pytorchvideo() -> dict[str, Model]:
    def of(name: str, frames: int, size: int) -> Model:
        return Model(lambda hub: getattr(hub, name)(pretrained=False), random(1, 3, frames, size, size))

    def slowfast(seed: int) -> tuple[Any, ...]:
        return ([random(1, 3, 8, 224, 224)(seed), random(1, 3, 32, 224, 224)(seed)],)

    return {
        "x3d_xs": of("x3d_xs", 4, 160),
        "slow_r50": of("slow_r50", 8, 224),
        "r2plus1d_r50": of("r2plus1d_r50", 16, 224),
        "slowfast_r50": Model(lambda hub: hub.slowfast_r50(pretrained=False), slowfast),
    }


def _lightly() -> dict[str, Model]:
    def on_resnet(heads: Callable[[Any], list[nn.Module]]) -> Model:
        def make(modules: Any) -> nn.Module:
            resnet = importlib.import_module("torchvision.models").resnet18(num_classes=1)
            resnet.fc = nn.Identity()
            return nn.Sequential(resnet, *heads(modules))

        return Model(make, random(2, 3, 64, 64))

    def nnclr(modules: Any) -> list[nn.Module]:
        return [modules.NNCLRProjectionHead(512, 64, 32), modules.NNCLRPredictionHead(32, 64, 32)]

    return {
        "SimCLR": on_resnet(lambda m: [m.SimCLRProjectionHead(512, 64, 32)]),
        "SimSiam": on_resnet(lambda m: [m.SimSiamProjectionHead(512, 64, 32), m.SimSiamPredictionHead(32, 16, 32)]),
        "BYOL": on_resnet(lambda m: [m.BYOLProjectionHead(512, 64, 32), m.BYOLPredictionHead(32, 64, 32)]),
        "BarlowTwins": on_resnet(lambda m: [m.BarlowTwinsProjectionHead(512, 64, 64)]),
        "NNCLR": on_resnet(nnclr),
        "SwaV": on_resnet(lambda m: [m.SwaVProjectionHead(512, 64, 32)]),
        "DINO": on_resnet(lambda m: [m.DINOProjectionHead(512, 64, 32, 32, batch_norm=True)]),
    }


MODELS: dict[str, Model] = {
    f"{library}/{name}": model
    for library, found in {
        "smp": _smp, "monai": _monai, "torchvision": _torchvision, "transformers": _transformers,
        "ultralytics": _ultralytics, "effdet": _effdet, "open_clip": _open_clip, "torchreid": _torchreid,
        "facenet": _facenet, "kornia": _kornia, "torchaudio": _torchaudio, "pytorchvideo": _pytorchvideo,
        "lightly": _lightly,
    }.items()
    for name, model in found().items()
}  # fmt: skip


def build(key: str) -> nn.Module:
    """The model with random weights, always the same."""
    library = importlib.import_module(LIBRARIES[key.split("/")[0]][0])
    torch.manual_seed(0)
    return MODELS[key].make(library)
