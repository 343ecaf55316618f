"""LPIPS: how far apart pictures are in the features of a VGG16. Zhang et al. 2018, arXiv 1801.03924."""

import torch
from torch import Tensor, nn

from mucs_cli.attribution.encoders import Preprocessing

WIDTHS = (64, 128, 256, 512, 512)
NUM_CONVOLUTIONS = (2, 2, 3, 3, 3)
TAPS = (4, 9, 16, 23, 30)
"""Where, in the list of layers, the features of each block end: before the pooling that follows."""
EPSILON = 1e-10
PREPROCESSING = Preprocessing((224, 224), None, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""The published network's shift and scale of [-1, 1] are, for values in [0, 1], ImageNet's mean and deviation."""


class LPIPS(nn.Module):
    """d = sum over blocks l, channels c of w_lc mean over places of (x_lc - y_lc)^2; equation 1 of the paper.

    x_l, y_l are the features of block l after its last ReLU, divided at each place by their length over the channels.
    ``features`` has torchvision's numbering of VGG16's layers; ``heads`` are the weights w_l, [C_l] each, >= 0.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        num_channels = 3
        for width, count in zip(WIDTHS, NUM_CONVOLUTIONS, strict=True):
            for _ in range(count):
                layers += [nn.Conv2d(num_channels, width, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
                num_channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])
        self.heads = nn.ParameterList(torch.zeros(width) for width in WIDTHS)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The distance of each pair.

        Args:
            first, second: [B, C, H, W] in [-1, 1], C 1 or 3; resized to 224 x 224.
        Returns:
            [B], float64, >= 0 and not bounded above; exactly 0 for identical pictures.
        """
        x, y = PREPROCESSING(first), PREPROCESSING(second)
        distance = torch.zeros(len(first), dtype=torch.float64, device=first.device)
        for start, stop, head in zip((0, *TAPS[:-1]), TAPS, self.heads, strict=True):
            block = self.features[start:stop]
            x, y = block(x), block(y)
            difference = (unit_features(x) - unit_features(y)).square().mean(dim=(2, 3))
            distance += difference.double() @ head.double()
        return distance


def unit_features(features: Tensor) -> Tensor:
    """[B, C, H, W], divided at each place by the length over the channels."""
    return features / (features.norm(dim=1, keepdim=True) + EPSILON)
