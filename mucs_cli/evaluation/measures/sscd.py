"""SSCD: embeddings of pictures trained to find copies of them. Pizzi et al. 2022, arXiv 2202.10261."""

from torch import Tensor, nn
from torch.nn import functional

from mucs_cli.attribution.encoders import Preprocessing

EMBEDDING_DIM = 512
POOLING_POWER = 3.0
POOLING_FLOOR = 1e-6
NUM_BLOCKS = (3, 4, 6, 3)
EXPANSION = 4
PREPROCESSING = Preprocessing(288, None, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""The shorter side becomes 288 pixels and nothing is cropped: the first of the two ways that the authors recommend."""


class Bottleneck(nn.Module):
    """A residual block of ResNet-50, He et al. 2016; the stride is in the 3 x 3 convolution, as in torchvision."""

    def __init__(self, num_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_channels, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, EXPANSION * width, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(EXPANSION * width)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or num_channels != EXPANSION * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(num_channels, EXPANSION * width, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(EXPANSION * width),
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(x)))
        hidden = functional.relu(self.bn2(self.conv2(hidden)))
        return functional.relu(self.bn3(self.conv3(hidden)) + self.downsample(x))


class SSCD(nn.Module):
    """ResNet-50, generalised-mean pooling with power 3, a linear layer to 512, divided by its length.

    Pooling of a channel: (mean over places of max(x, 1e-6)^3)^(1/3). Names of weights are torchvision's of ResNet-50.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        num_channels = 64
        for stage, count in enumerate(NUM_BLOCKS):
            width = 64 * 2**stage
            blocks = []
            for block in range(count):
                blocks.append(Bottleneck(num_channels, width, stride=2 if stage > 0 and block == 0 else 1))
                num_channels = EXPANSION * width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(num_channels, EMBEDDING_DIM)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W], preprocessed, -> [B, 512], of length 1."""
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(pixels))), kernel_size=3, stride=2, padding=1)
        for stage in range(len(NUM_BLOCKS)):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        pooled = x.clamp(min=POOLING_FLOOR).pow(POOLING_POWER).mean(dim=(2, 3)).pow(1 / POOLING_POWER)
        return functional.normalize(self.fc(pooled))

    def encode(self, images: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1], C 1 or 3, -> [B, 512], of length 1."""
        embedding: Tensor = self(PREPROCESSING(images))
        return embedding
