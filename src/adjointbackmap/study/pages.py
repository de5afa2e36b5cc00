"""The pages of the study: one for each question, with its first paragraphs and its pictures."""

from adjointbackmap.report.document import QuestionPage
from adjointbackmap.study.pictures.tables import white_noise

SHOWN = "vgg7-cifar10"  # the network of the pictures, if a page shows only one
PLAIN = "vgg7-nobias-cifar10"

PAGES = (
    QuestionPage(
        "judgement",
        "Which sentences hold, also under their controls?",
        "judgement",
        "Each sentence of the dissertation that can be measured is a row with a threshold, and so "
        "are controls of our own. [The rule](../study-rule.md) was written before the numbers were "
        "computed: three verdicts, intervals over images that are corrected for all rows, and two "
        "draws of images that must agree.\n\n"
        "The other pages show the experiments on the dissertation's own images. Their claims are "
        "about these images; where a page and this one differ, this one decides.",
        ("judgement/ratios-spread.png", "judgement/ratios-change.png"),
    ),
    QuestionPage(
        "looks",
        "What do hyperplanes look like?",
        "pictures",
        "A hyperplane has one number for each pixel and channel, so it can be drawn as an image: "
        "grey is zero, and each channel has its own colour. If the network has biases, the "
        "hyperplane has a second part with one number for each bias.\n\n"
        "To the eye, hyperplanes of classes look like coloured noise. They change from image to "
        "image. The hyperplanes of one class at two of its images are nearly at a right angle, "
        "and so are those of two classes. Two random directions in so many dimensions are at a "
        "right angle too: the angle says that hyperplanes share no direction, and no more.\n\n"
        "The reconstruction modes take a layer apart. RM1 has one hyperplane for each channel, "
        "RM2 for each unit, RM3 for each kernel, and RM4 for each kernel at one position.",
        (
            f"pictures/{SHOWN}-classes-0.png",
            f"pictures/{SHOWN}-classes-2.png",
            f"pictures/{SHOWN}-RM1-conv1.png",
            f"pictures/{SHOWN}-RM2-conv1.png",
            f"pictures/{SHOWN}-RM3-conv4.png",
        ),
        ("two of its images", "different positions", "one class at different images"),
    ),
    QuestionPage(
        "spectra",
        "Which frequencies do hyperplanes have?",
        "pictures",
        "An image has most of its energy at low frequencies, as neighbouring pixels are alike. A "
        "hyperplane has most of it at high ones. White noise is the control: it has the same "
        f"energy at every frequency, and {100 * white_noise():.1f} % of it is above a quarter "
        "cycle per pixel, because most frequencies of a square are high. The hyperplanes of "
        "classes are close to it, some above and some below. So they are not richer in high "
        "frequencies than noise; what they lack are the low frequencies of images.\n\n"
        "The line of energy by frequency is the energy in a ring of the spectrum. Rings beyond "
        "half a cycle are cut by the edges of the spectrum, so each line falls there, that of "
        "white noise too.",
        (
            "pictures/spectra-0-0.png",
            "pictures/profiles-0.png",
            "pictures/high-by-layer.png",
        ),
        ("high frequencies", "irregular pixels", "Spectra of images"),
    ),
    QuestionPage(
        "surroundings",
        "How much of an image do kernels use, and what surrounds it?",
        "pictures",
        "A ReLU that is off cuts its paths to the image. So a kernel at one position (RM4) may "
        "use only a part of its receptive field, or nothing at all. Layers with a leaky slope, as "
        "in ResNet20, cut nothing: there no hyperplane is zero, and each uses its whole field. "
        "In fixup-resnet20-nobias-cifar10, training left whole channels of some convolutions at "
        "zero, so many of its zero hyperplanes have no ReLU as their cause.\n\n"
        "Around an image there is a region in which the network is one linear map. It ends at the "
        "nearest kink, where the first unit changes its sign. The nearest class boundary is much "
        "farther. A hyperplane at the image therefore says nothing about the boundary by itself: "
        "many regions are in between.",
        (
            "pictures/sparsity-zero.png",
            "pictures/sparsity-whole.png",
            "pictures/distances.png",
        ),
    ),
    QuestionPage(
        "noise",
        "What does adversarial noise do to hyperplanes? (experiment 1)",
        "noise",
        "An image is attacked until its class changes. The noise is small, and most pixels change "
        "by one step of the attack. The hyperplanes change by more than the image: gates flip, so "
        "that the network is another linear map.\n\n"
        "H_adv is the hyperplane at the adversarial image, and H_orig the one at the original "
        "image. At the adversarial image, H_adv gives the network's outputs and H_orig does not. "
        "The first of these must hold for any network; it is a test of the computation.",
        (
            f"noise/{SHOWN}-attacked.png",
            f"noise/{SHOWN}-image.png",
            f"noise/{SHOWN}-bias.png",
            f"noise/{PLAIN}-kernels.png",
            "noise/by-layer.png",
        ),
    ),
    QuestionPage(
        "targets",
        "How far do targeted attacks spread a hyperplane? (experiment 2)",
        "targets",
        "One image is attacked nine times, each time with another class as the target. Nine "
        "attacked images and the image itself give ten hyperplanes of one class. They are compared "
        "with the hyperplanes of that class at ten images of other classes.\n\n"
        "The dissertation judges their spread by pictures of tSNE. Such a picture evens out how "
        "dense points lie, so its distances mean little. The ratio of spreads in the original "
        "space is the evidence. It depends on which ten images are drawn. The interval below is "
        "over these images and attacks; where it has values on both sides of the threshold, one "
        "run decides little.",
        (
            f"targets/{SHOWN}-inputs.png",
            f"targets/{SHOWN}-image.png",
            f"targets/{SHOWN}-bias.png",
            f"targets/{SHOWN}-tsne-image.png",
            "targets/ratios.png",
        ),
    ),
    QuestionPage(
        "scaled",
        "Does adversarial noise spread hyperplanes more than Gaussian noise? (experiment 3)",
        "scaled",
        "Adversarial noise is scaled down at random, as far as it still changes the class. It is "
        "compared with Gaussian noise of the same mean and variance, which leaves the class. The "
        "control is Gaussian noise that also has the variance of each pixel.\n\n"
        "The dissertation shows two factors of the hyperplanes. Factors are directions that many "
        "patterns share. Adversarial patterns come from nine attacks, so they share nine "
        "directions; Gaussian ones share none. A large ratio in the picture of two factors follows "
        "from this alone, whatever the network is. Only the original space counts, and "
        "there image parts and bias parts differ: the charts of ratios show both.",
        (
            "scaled/ratios-image.png",
            "scaled/ratios-bias.png",
            f"scaled/{SHOWN}-image.png",
            f"scaled/{SHOWN}-bias.png",
        ),
    ),
    QuestionPage(
        "strengths",
        "What do attacks of today do to hyperplanes, and what does other noise of their size?",
        "strengths",
        "The attacks of the dissertation have no limit but a number of steps. Here projected "
        "gradient descent (PGD) stays in a ball, and the ball grows from one grey level of 255 to "
        "eight. Three controls have the same size: random signs, nine Gaussian directions, which "
        "have the rank of the nine attacks, and independent Gaussian noise.\n\n"
        "Where the curve of PGD is above that of the nine directions, the direction of the noise "
        "matters, and not its size or its rank.",
        (f"strengths/{SHOWN}-curves.png", "strengths/resnet20-cifar10-curves.png"),
    ),
    QuestionPage(
        "many-images",
        "Does it hold for many images?",
        "many",
        "Experiments 1 and 3 of the dissertation are on one image for each network. Here they are "
        "repeated on a drawn sample. A claim about most images holds if the 95 % interval of the "
        "share lies above one half, for each network.",
        ("many/flipped-cifar10.png", "many/angles.png", "many/spread.png"),
    ),
    QuestionPage(
        "attributions",
        "How do hyperplanes compare with attribution methods?",
        "attributions",
        "An attribution method gives each pixel a number. If these numbers sum to the logit, "
        "nothing is missing. The hyperplane's contributions, image part and bias part together, do "
        "so by construction. Where there are biases, pixels alone do not.\n\n"
        "This is a test of completeness. It does not say which map is the better explanation.",
        (
            f"attributions/{SHOWN}-maps.png",
            f"attributions/{SHOWN}-biases.png",
            "attributions/errors.png",
        ),
    ),
    QuestionPage(
        "origins",
        "How much of a logit do pixels carry?",
        "origins",
        "The value of a unit is what its pixels add plus what all biases add. A picture of an "
        "image part shows the first sum only. In a network without biases that is everything. In "
        "all six networks with biases it is, for the median image, nothing: the biases carry the "
        "logit. In five of the six, a late layer has the largest share of it; in vgg7-cifar100 it "
        "is conv1. The tables have the numbers.\n\n"
        "This is a fact about the whole sum, not about single pixels. Large positive and negative "
        "contributions cancel, and for one image the share may be large. A picture of an image "
        "part says where the network's answer changes with a pixel. It does not say where the "
        "answer comes from, unless the bias part is shown with it.\n\n"
        "Two things could make this an artefact. The logit has an arbitrary offset, so the margin "
        "over the second class is measured too. And pixels need an origin: zero, the mean image "
        "and black are compared. What the origin itself contributes is then counted with the "
        "biases.",
        (f"origins/{SHOWN}-shares.png", "origins/resnet20-cifar10-shares.png"),
    ),
)
"""In the order of reading."""
