def write_pipeline(out, pipeline, extra={}):
    pipeline.save_pretrained(out)
    return [out / "model_index.json"]
