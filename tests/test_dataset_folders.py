"""Folders as people have them: links, masks, runs, captions in every kind of file; nothing is lost in silence."""

import os
import time

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdtune.config.methods.ddpm import DdpmConfig
from sdtune.config.sections import UserError
from sdtune.data import Stream, load_images
from tests.image_folders import captions, config, names, paint, refusal, rows_to, summary, write


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pictures"
    path.mkdir()
    return path


# ---- links


@pytest.mark.fault("An image is a link out of the dataset's folder", "Refused; `--follow-links` reads it.")
def test_links_out_of_the_folder_are_refused_or_followed(folder, tmp_path):
    paint(folder / "a.png")
    (folder / "b.png").symlink_to(paint(tmp_path / "library" / "b.png", shade=1))
    said = refusal(folder, caption="x")
    assert "b.png -> " in said and "--follow-links" in said
    assert names(load_images(config(folder, caption="x", follow_links=True))) == ["a.png", "b.png"]


def test_links_inside_the_folder_are_fine(folder):
    paint(folder / "a.png")
    (folder / "b.png").symlink_to("a.png")
    (folder / "c").symlink_to(folder)  # would never end
    images = load_images(config(folder, caption="x"))
    assert names(images) == ["a.png", "b.png"]
    assert names(load_images(config(folder, caption="x", follow_links=True))) == ["a.png", "b.png"]


@pytest.mark.fault("A link in the dataset's folder leads to itself, or to nothing", "Left out, and counted as ignored.")
def test_links_that_lead_nowhere_are_left_out(folder):
    paint(folder / "a.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "gone.png").symlink_to("nothing.png")
    images = load_images(config(folder, caption="x"))
    assert names(images) == ["a.png"] and sorted(images.ignored) == ["gone.png", "loop.png"]


def test_the_first_of_two_links_to_a_folder_counts(folder, tmp_path):
    paint(folder / "a.png")
    paint(tmp_path / "library" / "x.png", shade=1)
    for name in ("two", "one"):
        (folder / name).symlink_to(tmp_path / "library")
    assert names(load_images(config(folder, caption="x", follow_links=True))) == ["a.png", "one/x.png"]


def test_linked_folders_are_named_or_followed(folder, tmp_path):
    paint(tmp_path / "library" / "deep" / "a.png")
    (tmp_path / "library" / "back").symlink_to(tmp_path / "library")
    (folder / "linked").symlink_to(tmp_path / "library")
    assert "linked/ is a link to a folder, which --follow-links reads" in refusal(folder, caption="x")
    assert names(load_images(config(folder, caption="x", follow_links=True))) == ["linked/deep/a.png"]
    paint(folder / "b.png")
    assert "links to folders, not read without --follow-links: linked/" in summary(folder, caption="x")


@pytest.mark.fault("A caption file is a link out of the dataset's folder", "Never read.")
@pytest.mark.parametrize("follow_links", [False, True])
def test_captions_outside_of_the_folder_are_never_read(folder, tmp_path, follow_links):
    paint(folder / "a.png")
    secret = write(tmp_path / "id_rsa", "BEGIN PRIVATE KEY")
    (folder / "a.txt").symlink_to(secret)
    said = refusal(folder, follow_links=follow_links)
    assert "a.txt -> " in said and "captions and metadata are never read from outside" in said
    (folder / "a.txt").unlink()
    (folder / "metadata.jsonl").symlink_to(rows_to(tmp_path / "m.jsonl", {"file_name": "a.png", "text": "secret"}))
    assert "metadata.jsonl -> " in refusal(folder, follow_links=follow_links)
    assert load_images(config(folder, caption="x", follow_links=follow_links))  # where they are not needed


def test_captions_in_a_linked_folder_are_outside(folder, tmp_path):
    paint(tmp_path / "library" / "a.png")
    write(tmp_path / "library" / "a.txt", "from elsewhere")
    (folder / "linked").symlink_to(tmp_path / "library")
    assert "linked/a.txt -> " in refusal(folder, follow_links=True)


def test_only_the_hubs_cache_is_made_of_links(tmp_path):
    secret = write(tmp_path / "datasets--a--b" / "blobs" / "1", "a heart")
    for folder, fine in (("datasets--a--b/snapshots/1/deep", True), ("backup/snapshots/1", False)):
        paint(tmp_path / folder / "a.png")
        (tmp_path / folder / "a.txt").symlink_to(secret)
        if fine:
            assert captions(load_images(config(tmp_path / folder))) == {"a.png": ("a heart",)}
        else:
            write(tmp_path / "backup" / "blobs" / "1", "secret")
            (tmp_path / folder / "a.txt").unlink()
            (tmp_path / folder / "a.txt").symlink_to(tmp_path / "backup" / "blobs" / "1")
            assert "a.txt -> " in refusal(tmp_path / folder)


# ---- what sdtune wrote


def run_in(folder):
    """What a run leaves."""
    write(folder / "config.yaml", "method: lora\n")
    write(folder / "metrics.jsonl", "")
    paint(folder / "samples" / "step-000000.png", shade=9)
    paint(folder / "class-pictures" / "made-00000.png", shade=8)


@pytest.mark.fault("A run's folder is inside the dataset", "Its files are left out, with a line.")
def test_runs_inside_the_dataset_are_left_out(folder):
    paint(folder / "a.png")
    run_in(folder / "runs" / "lora")
    assert names(load_images(config(folder, caption="x"))) == ["a.png"]
    assert "written by sdtune, left out: runs/lora/" in summary(folder, caption="x")
    (folder / "a.png").unlink()
    assert "runs/lora/ was written by sdtune" in refusal(folder, caption="x")


def test_a_run_in_the_dataset_folder_itself(folder):
    paint(folder / "a.png")
    write(folder / "config.yaml", "method: lora\n")
    write(folder / "metrics.jsonl", "")
    paint(folder / "samples" / "step-000000.png")
    assert names(load_images(config(folder, caption="x"))) == ["a.png"]


def test_class_images_are_no_subjects(folder):
    paint(folder / "a.png")
    info = PngInfo()
    info.add_itxt("sdtune", "{}")
    (folder / "class").mkdir()
    Image.new("RGB", (16, 16)).save(folder / "class" / "made-00000.png", pnginfo=info)
    paint(folder / "class" / "made-00001.png")  # somebody else's
    assert names(load_images(config(folder, caption="x"))) == ["a.png", "class/made-00001.png"]
    left = load_images(config(folder, caption="x"), leave_out=folder / "class")
    assert names(left) == ["a.png"]
    assert names(load_images(config(folder / "class", caption="x"))) == ["made-00000.png", "made-00001.png"]


# ---- masks


@pytest.mark.fault("Masks lie among the images", "They are left out, with a line; `--masked-loss` uses them.")
@pytest.mark.parametrize(
    "mask", ["a-mask.png", "a_mask.png", "a.mask.png", "a-masklabel.png", "masks/a.png", "mask/a.jpg"]
)
def test_masks_are_not_trained_on(folder, mask):
    paint(folder / "a.png")
    paint(folder / mask, shade=255)
    images = load_images(config(folder, caption="x"))
    assert names(images) == ["a.png"] and images.mask(0) is None
    assert "masks: 1, not trained on; --masked-loss weighs the loss by them" in summary(folder, caption="x")
    images = load_images(config(folder, caption="x", masked_loss=True))
    assert images.mask(0) == folder / mask
    assert images.fingerprint != load_images(config(folder, caption="x")).fingerprint


def test_what_only_looks_like_a_mask_is_an_image(folder):
    for name in ("carnival-mask.png", "masks/venice.png", "masked.png"):
        paint(folder / name)
    assert names(load_images(config(folder, caption="x"))) == ["carnival-mask.png", "masked.png", "masks/venice.png"]


def test_masks_follow_the_crop_and_the_flip(folder):
    image = Image.new("RGB", (32, 16))
    image.paste((255, 255, 255), (24, 0, 32, 16))
    image.save(folder / "a.png")
    image.convert("L").save(folder / "a-mask.png")
    fields = {"caption": "x", "masked_loss": True, "center_crop": False, "random_flip": True}
    stream = Stream(config(folder, **fields), load_images(config(folder, **fields)), 1)
    for position in range(12):
        sample = stream[position]
        pixels, mask = (stream.pixels(sample)[:1] + 1) / 2, stream.mask(sample)
        assert mask.shape == (1, 16, 16) and (pixels - mask).abs().mean() < 0.05, position
    flips = {stream[p].flip for p in range(12)}
    assert flips == {True, False}


def test_masks_that_cannot_be_used_are_named(folder):
    for name in "abc":
        paint(folder / f"{name}.png")
    paint(folder / "a-mask.png", (16, 32), shade=9)
    Image.new("L", (16, 16)).save(folder / "b-mask.png")
    write(folder / "c-mask.png", "no image")
    said = refusal(folder, caption="x", masked_loss=True)
    assert (
        "a-mask.png: has another shape" in said and "b-mask.png: is all black" in said and "c-mask.png: not an" in said
    )
    for mask in folder.glob("*-mask.png"):
        mask.unlink()
    with pytest.raises(UserError, match="has no masks"):
        Stream(config(folder, caption="x", masked_loss=True), load_images(config(folder, caption="x")), 1)


def test_the_pixel_methods_leave_masks_out_too(folder):
    paint(folder / "a.png")
    paint(folder / "a-mask.png")
    assert names(load_images(DdpmConfig(dataset=str(folder), resolution=16), captions=False)) == ["a.png"]


# ---- captions


@pytest.mark.parametrize("file", ["a.txt", "a.TXT", "a.caption", "a.Caption", "a.png.txt", "a.png.caption"])
def test_caption_files_of_every_kind(folder, file):
    paint(folder / "a.png")
    write(folder / file, "a heart\n")
    images = load_images(config(folder))
    assert images.rows[0].captions == ("a heart",) and not images.ignored


def test_two_caption_files_of_one_image(folder):
    paint(folder / "a.png")
    write(folder / "a.txt", "one")
    write(folder / "a.caption", "two")
    assert "a.png: has captions in a.caption and in a.txt; remove all but one" in refusal(folder)


@pytest.mark.parametrize("content", ['{"a.png": "x"}', '{"a": {"caption": "x", "tags": "y"}}', '{"A.PNG": ["x"]}'])
def test_captions_json(folder, content):
    paint(folder / "a.png")
    write(folder / "captions.json", content)
    assert captions(load_images(config(folder))) == {"a.png": ("x",)}


@pytest.mark.parametrize("content", ["[1]", "{", '{"a.png": 3}', '{"b.png": "x"}', "[" * 100_000])
def test_bad_captions_json(folder, content):
    paint(folder / "a.png")
    write(folder / "captions.json", content)
    assert "captions.json" in refusal(folder)


def test_names_in_another_case(folder):
    paint(folder / "a.png")
    rows_to(folder / "Metadata.jsonl", {"File_Name": "A.PNG", "Text": "x"})
    assert captions(load_images(config(folder))) == {"a.png": ("x",)}
    assert "in upper and lower case: 1" in summary(folder)
    paint(folder / "A.png")
    rows_to(folder / "Metadata.jsonl", {"File_Name": "A.PNG", "Text": "x"}, {"File_Name": "A.png", "Text": "y"})
    if len(list(folder.glob("*.png"))) == 2:  # not on file systems that know no case
        assert "there is no image A.PNG" in refusal(folder)


@pytest.mark.parametrize("file", ["captions.yaml", "captions.txt", "b.caption"])
def test_files_that_may_hold_captions_are_named(folder, file):
    paint(folder / "a.png")
    write(folder / file, "a.png: x")
    assert f"have no captions; it has {file}, which is not read" in refusal(folder)


def test_a_caption_a_line(folder):
    paint(folder / "a.png")
    write(folder / "a.txt", "a heart\n\na red   heart\n")
    assert captions(load_images(config(folder)))["a.png"] == ("a heart a red heart",)
    assert "several lines, joined to one caption: 1" in summary(folder)
    assert captions(load_images(config(folder, caption_per_line=True)))["a.png"] == ("a heart", "a red heart")
    assert "several lines" not in summary(folder, caption_per_line=True)


def shuffled(folder, text, **fields):
    write(folder / "a.txt", text)
    cfg = config(folder, shuffle_tags=True, **fields)
    stream = Stream(cfg, load_images(cfg), 1)
    return {stream[p].caption for p in range(60)}


def test_separators_of_other_trainers(folder):
    paint(folder / "a.png")
    assert shuffled(folder, "sks toy ||| red, blue ||| best") == {
        "sks toy, red, blue, best",
        "sks toy, blue, red, best",
    }
    assert shuffled(folder, "sks，red、blue", keep_tags=1) == {"sks, red, blue", "sks, blue, red"}
    write(folder / "a.txt", "sks ||| red, blue")
    cfg = config(folder)
    stream = Stream(cfg, load_images(cfg), 1)
    assert stream[0].caption == "sks, red, blue" and stream[0].caption in stream.texts()
    assert "in which ||| separates tags that stay in place: 1" in summary(folder)


@pytest.mark.parametrize("text", ["a (red:1.4) heart", "heart, <lora:style:0.8>", "(a b : 0.5)"])
def test_weights_in_captions_are_told(folder, text):
    paint(folder / "a.png")
    write(folder / "a.txt", text)
    assert "read as ordinary text: 1 (a.png)" in summary(folder)
    write(folder / "a.txt", "a heart (red), 16:9, <s1>")
    assert "ordinary text" not in summary(folder)
    began = time.process_time()
    for endless in ("(a:" + "1" * 19_000, "(a " * 6_000, "(" + ":" * 19_000, "<lora:" * 3_000):
        write(folder / "a.txt", endless)
        assert "ordinary text" not in summary(folder)
    assert time.process_time() - began < 5


@pytest.mark.fault("A caption has megabytes", "Refused in a moment.")
def test_endless_captions_are_refused_at_once(folder):
    paint(folder / "a.png")
    write(folder / "a.txt", "x" * 20_000_000)
    began = time.process_time()
    assert "a.txt: has 20,000,000 bytes" in refusal(folder)
    (folder / "a.txt").unlink()
    rows_to(folder / "metadata.jsonl", {"file_name": "a.png", "text": "x" * 2_000_000})
    assert "the caption has 2,000,000 characters; at most 20,000 are read" in refusal(folder)
    assert time.process_time() - began < 5


# ---- repeats


def test_repeats_by_the_name_of_a_folder(folder):
    paint(folder / "10_sks toy" / "a.png")
    paint(folder / "2_toy" / "b.png", shade=1)
    write(folder / "2_toy" / "b.txt", "a toy")
    paint(folder / "c.png", shade=2)
    said = summary(folder, caption="x")
    assert "folders named like kohya's repeats: 10_sks toy, 2_toy" in said and "--folder-repeats" in said
    write(folder / "c.txt", "rest")
    cfg = config(folder, folder_repeats=True)
    images = load_images(cfg)
    assert captions(images) == {"10_sks toy/a.png": ("sks toy",), "2_toy/b.png": ("a toy",), "c.png": ("rest",)}
    stream = Stream(cfg, images, 1)
    assert stream.epoch_length == 13
    shown = [stream[p].name for p in range(13)]
    assert [shown.count(name) for name in ("10_sks toy/a.png", "2_toy/b.png", "c.png")] == [10, 2, 1]


def test_names_of_folders_are_offered_where_captions_are_missing(folder):
    paint(folder / "10_sks toy" / "a.png")
    assert "--folder-repeats, which captions images in 10_sks toy with that name" in refusal(folder)
    paint(folder / "other" / "b.png")
    write(folder / "other" / "b.txt", "x")
    assert "10_sks toy/a.png: no 10_sks toy/a.txt" in refusal(folder)


# ---- no images


@pytest.mark.parametrize(
    ("name", "said"),
    [("data.zip", "unpack the .zip files first"), ("data-0.arrow", "save_to_disk"), ("a.psd", "accepted are")],
)
def test_why_there_are_no_images(folder, name, said):
    write(folder / name, "x")
    assert said in refusal(folder, caption="x")


@pytest.mark.fault("An image is a device or a pipe", "Never opened.")
def test_devices_are_no_images(folder):
    paint(folder / "a.png")
    (folder / "b.png").symlink_to(os.devnull)
    assert names(load_images(config(folder, caption="x", follow_links=True))) == ["a.png"]
