"""Put iEdit's blocks for Modular Diffusers on the Hub, or into a folder, where they work without this package.

    python examples/push_blocks.py OWNER/NAME
    python examples/push_blocks.py --output-dir blocks

The token is that of `hf auth login` or `HF_TOKEN`. How the blocks are loaded and used: `help(IEditBlocks)`.
"""

import argparse

from diffusers_iedit.modular_iedit import IEditBlocks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("repo_id", nargs="?", help="the repository on the Hub, which is made if need be")
    where.add_argument("--output-dir", help="a folder instead")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    args = parser.parse_args()

    if args.output_dir:
        IEditBlocks().save_pretrained(args.output_dir)
    else:
        print(IEditBlocks().push_to_hub(args.repo_id, private=args.private))


if __name__ == "__main__":
    main()
