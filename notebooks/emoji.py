"""The worked example of captioned pictures: a colour font drawn as a folder of pictures and their names.

Run:    python notebooks/emoji.py --out out/emoji      # then: python train_vq.py --data out/emoji
"""
import sys
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runs import counting, explained, flag_parser, run          # found through the line above


def draw_emoji(font, folder, size=32):
    """Every emoji of a colour font that is one code point, on white, as folder/1f600.png, its lower-cased
    Unicode name in 1f600.txt. Returns how many."""
    with explained(f"--font {font} cannot be used", "on Debian, apt-get install fonts-noto-color-emoji puts "
                   "NotoColorEmoji.ttf into /usr/share/fonts/truetype/noto", OSError):
        # The one size in which Noto's bitmaps are stored; they fill 136 x 128 pixels.
        font = ImageFont.truetype(font, 109)
    folder, count = Path(folder), 0
    folder.mkdir(parents=True, exist_ok=True)

    def picture(character):
        canvas = Image.new("RGB", (136, 136), "white")
        ImageDraw.Draw(canvas).text((0, 4), character, font=font, embedded_color=True)
        return canvas

    # A font draws what it lacks as nothing or as the box that stands for every missing character.
    blank, missing = picture(" ").tobytes(), picture("\U0010fffd").tobytes()
    for code in range(0xa9, 0x1fb00):
        name = unicodedata.name(chr(code), "").lower()
        if name and unicodedata.category(chr(code))[0] in "SP":
            drawn = picture(chr(code))
            if drawn.tobytes() not in (blank, missing):
                drawn.resize((size, size), Image.Resampling.LANCZOS).save(folder / f"{code:x}.png")
                (folder / f"{code:x}.txt").write_text(name, encoding="utf-8")
                count += 1
    return count


def get_args(argv=None):
    parser = flag_parser(__file__, __doc__)
    add = parser.add_argument
    add("--font", default="/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
        help="the font's file; the default is that of Debian's fonts-noto-color-emoji")
    add("--out", default="out/emoji", help="the folder")
    add("--image-size", type=counting, default=32, help="side of a picture in pixels")
    return parser.parse_args(argv)


def main(args):
    print(f"{draw_emoji(args.font, args.out, args.image_size):,} captioned pictures -> {args.out}")


if __name__ == "__main__":
    run(main, get_args)
