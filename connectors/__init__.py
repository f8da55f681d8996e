"""Connectors from encoder states to decoder inputs, by name; entry-point group `metalm.connectors`."""

from metalm.registry import Registry

CONNECTORS = Registry(
    "connector",
    group="metalm.connectors",
    builtin={
        "linear": "metalm.connectors.linear:LinearConnector",
        "feedforward": "metalm.connectors.feedforward:FeedForwardConnector",
        "perceiver": "metalm.connectors.perceiver:PerceiverConnector",
        "qformer": "metalm.connectors.qformer:QFormerConnector",
        "stack": "metalm.connectors.stack:StackConnector",
        "pixel_shuffle": "metalm.connectors.pixel_shuffle:PixelShuffleConnector",
        "convolution": "metalm.connectors.convolution:ConvolutionConnector",
    },
)
