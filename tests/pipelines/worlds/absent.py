"""Flow pipelines that are not built here, with the reason."""

NOT_BUILT = {"OmniGenPipeline": "its processor needs torchvision, which is not installed here"}
