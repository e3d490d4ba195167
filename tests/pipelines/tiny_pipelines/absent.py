"""Flow pipelines that are not built here, with the reason."""

NOT_BUILT = {
    "OmniGenPipeline": "its processor needs torchvision, which is not installed here",
    "Kandinsky6SRPipeline": "a call denoises batch after batch of tiles over one grid, which it "
    "sets once; what is recorded would be no turn of a trajectory",
    "LTX2VideoDiffusionDecodePipeline": "it decodes latents by a decoder that denoises pixels, and "
    "has no transformer; the latents come from one of the other LTX-2 pipelines",
}
