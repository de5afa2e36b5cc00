"""The published columns of the dissertation, in percent, with their sources."""

from dataclasses import dataclass

VGG7_LAYERS = (*(f"conv{i}" for i in range(1, 6)), "fc")
RESNET20_LAYERS = (*(f"conv{i}" for i in range(1, 19)), "fc")


@dataclass(frozen=True)
class Column:
    """Published shares of the units of a network with a signed relative error of at most 1 %.

    The shares are over 10,000 test images.

    Attributes:
        source: The table or caption in [Wan2022].
        figure: The figure with the histograms.
        shares: Name of a layer -> percent.
        at_least: Whether only a lower bound was published, the same for every layer.
    """

    source: str
    figure: str
    shares: dict[str, float]
    at_least: bool = False


def _vgg7(source: str, figure: str, text: str) -> Column:
    return Column(source, figure, dict(zip(VGG7_LAYERS, map(float, text.split()), strict=True)))


def _resnet20(source: str, figure: str, text: str) -> Column:
    return Column(source, figure, dict(zip(RESNET20_LAYERS, map(float, text.split()), strict=True)))


PUBLISHED_COLUMNS = {
    "vgg7-nobias-cifar10": _vgg7(
        "caption of Fig. 2.4",
        "Fig. 2.4",
        "99.9996 99.9996 99.9989 99.9989 99.9989 99.996",
    ),
    "fixup-resnet20-nobias-cifar10": Column(
        "caption of Fig. 2.5",
        "Fig. 2.5",
        dict.fromkeys(RESNET20_LAYERS, 99.997),
        at_least=True,
    ),
    "vgg7-cifar10": _vgg7(
        "Table 3.3",
        "Fig. 3.6",
        "99.9987 99.9978 99.9985 99.9935 99.9933 99.991",
    ),
    "resnet20-cifar10": _resnet20(
        "Table 3.3",
        "Fig. 3.7",
        """
        99.9999 99.9994 99.999 99.9977 99.9974 99.9919 99.9835 99.9839 99.986 99.9877 99.9835
        99.9871 99.9807 99.9808 99.978 99.9781 99.9764 99.978 99.989
        """,
    ),
    "fixup-resnet20-cifar10": _resnet20(
        "Table 3.3",
        "Fig. 3.8",
        """
        99.9972 99.9992 99.9993 99.9989 99.9974 99.9975 99.9914 99.9946 99.9954 99.9959 99.9953
        99.9955 99.9935 99.9935 99.9943 99.9934 99.9929 99.9927 99.992
        """,
    ),
    "vgg7-cifar100": _vgg7(
        "Table 3.4",
        "Fig. 3.9",
        "99.9988 99.9978 99.998 99.9928 99.993 99.9807",
    ),
    "resnet20-cifar100": _resnet20(
        "Table 3.4",
        "Fig. 3.10",
        """
        99.9997 99.9995 99.9988 99.9963 99.9968 99.9833 99.9789 99.9751 99.9878 99.9808 99.979
        99.9839 99.9767 99.9746 99.9744 99.9726 99.9705 99.9705 99.9777
        """,
    ),
    "fixup-resnet20-cifar100": _resnet20(
        "Table 3.4",
        "Fig. 3.11",
        """
        99.9997 99.9995 99.9993 99.9992 99.9989 99.9967 99.9896 99.9951 99.9952 99.9953 99.994
        99.9953 99.9921 99.9935 99.9941 99.993 99.9935 99.9949 99.9896
        """,
    ),
}
"""Name of a shipped network -> its column."""
