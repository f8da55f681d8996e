"""Run configurations, bundled with the package: `metalm train demo/pretrain.yaml` finds them anywhere."""
