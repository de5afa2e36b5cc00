"""Tables 4.1 to 4.5 of the dissertation: outputs at an adversarial image.

Each output is also reconstructed with the hyperplanes of the adversarial and of the original
image.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outputs:
    """A table of ten classes, as printed.

    Attributes:
        source: The table in [Wan2022].
        figure: The figure of the same experiment.
        label: Class of the original image.
        network: The network's outputs at the adversarial image.
        adversarial: Reconstructed with the hyperplanes of the adversarial image.
        original: Reconstructed with the hyperplanes of the original image.
    """

    source: str
    figure: str
    label: str
    network: tuple[str, ...]
    adversarial: tuple[str, ...]
    original: tuple[str, ...]

    @property
    def numbers(self) -> tuple[list[float], list[float], list[float]]:
        """The three columns as numbers."""
        network, adversarial, original = (
            list(map(float, c)) for c in (self.network, self.adversarial, self.original)
        )
        return network, adversarial, original


def _outputs(source: str, figure: str, label: str, text: str) -> Outputs:
    rows = [line.split() for line in text.strip().splitlines()]
    network, adversarial, original = zip(*rows, strict=True)
    return Outputs(source, figure, label, network, adversarial, original)


OUTPUTS = {
    "vgg7-nobias-cifar10": _outputs(
        "Table 4.1",
        "Fig. 4.2",
        "horse",
        """
        8.31594 8.315954 8.6690855
        4.0766134 4.0766125 4.471591
        7.1327333 7.132732 7.3968844
        8.730146 8.730144 8.764506
        7.252265 7.252265 7.06274
        9.732837 9.732836 9.646278
        5.3150105 5.315008 5.101524
        9.613704 9.613699 7.970075
        -1.3195618 -1.3195606 -1.1485753
        6.7904973 6.7904935 7.129147
        """,
    ),
    "fixup-resnet20-nobias-cifar10": _outputs(
        "Table 4.2",
        "Fig. 4.3",
        "horse",
        """
        -0.9798855 -0.97988594 0.0621146
        -2.5764616 -2.5764558 -0.5108745
        -0.5919545 -0.59196144 -6.3072925
        10.356275 10.356285 7.726749
        5.80124 5.801249 -8.883365
        10.47916 10.47917 -0.43725738
        3.5252628 3.5252705 -1.7145596
        6.5016255 6.5016294 -19.942373
        -6.2591143 -6.2591157 -1.7208233
        2.1569839 2.1569812 -0.61982846
        """,
    ),
    "vgg7-cifar10": _outputs(
        "Table 4.3",
        "Fig. 4.6",
        "bird",
        """
        4.654 4.655 -4.927
        -0.194 -0.194 3.109
        10.561 10.561 -22.695
        14.794 14.794 8.459
        7.060 7.060 6.703
        8.961 8.961 17.681
        0.329 0.329 -3.711
        2.009 2.009 -2.211
        1.153 1.153 3.265
        3.127 3.127 6.592
        """,
    ),
    "resnet20-cifar10": _outputs(
        "Table 4.4",
        "Fig. 4.7",
        "bird",
        """
        -0.575 -0.575 1.683
        -3.718 -3.718 14.552
        3.780 3.780 -33.297
        7.480 7.480 20.085
        9.631 9.631 20.219
        2.895 2.895 20.013
        -4.851 -4.851 -18.750
        -4.921 -4.921 6.888
        1.068 1.068 7.762
        -0.191 -0.191 8.563
        """,
    ),
    "fixup-resnet20-cifar10": _outputs(
        "Table 4.5",
        "Fig. 4.8",
        "bird",
        """
        8.417 8.417 3.307
        2.965 2.965 3.379
        4.406 4.406 -53.405
        4.508 4.508 -20.650
        7.583 7.583 -12.317
        -0.657 -0.657 -17.084
        0.953 0.953 -17.560
        -0.394 -0.394 -7.833
        8.019 8.019 11.134
        3.787 3.787 4.604
        """,
    ),
}
"""Name of a shipped network -> its table. Rows are the classes of CIFAR-10 in their order."""
