"""Convert a generator released by the SiD-LSG authors into a folder that sid_lsg.py samples from.

    python tests/read_official.py official.pkl FOLDER
    python sid_lsg.py sample --generator FOLDER --teacher SD15

The official code (training/sid_training_loop.py 641-650) pickles a diffusers UNet2DConditionModel
under "ema". A pickle can run any code, so we refuse every name outside a short list.
"""

import argparse
import io
import json
import pickle
import re
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import unet

ALLOWED = {
    'collections.OrderedDict': dict,
    'torch._utils._rebuild_parameter': torch._utils._rebuild_parameter,
    'torch._utils._rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
    # torch's own _load_from_bytes is a complete torch.load, which would unpickle anything.
    'torch.storage._load_from_bytes':
        lambda data: torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)}
NETWORKS = ('diffusers.', 'torch.nn.modules.', 'xformers.', 'peft.')


class OfficialUnpickler(pickle.Unpickler):
    """Rebuilds tensors. Every network class becomes an empty class that only keeps attributes."""

    def find_class(self, module, name):
        """Return a harmless substitute for a name, or refuse it; nothing is imported."""
        full = f'{module}.{name}'
        if full in ALLOWED:
            return ALLOWED[full]
        unet.check(module.startswith(NETWORKS), f'asks for {full}')
        return type(name, (dict,), {'__init__': lambda self, *_: None})


def tensors_of(module, prefix=''):
    """Yield (name, tensor) of the parameters and buffers of a module and of its children."""
    for name, value in {**module._parameters, **module._buffers, **module._modules}.items():
        if torch.is_tensor(value):
            yield prefix + name, value
        elif value is not None:
            yield from tensors_of(value, f'{prefix}{name}.')


def read_generator(file):
    """Read the UNet of an official generator and the resolution of its images."""
    unet.check(file.is_file(), f'there is no file {file}; give a .pkl of the SiD-LSG authors')
    with open(file, 'rb') as opened:
        head = opened.peek(16)
        try:
            module = OfficialUnpickler(opened).load()['ema']
            config = {key: list(value) if isinstance(value, tuple) else value     # as JSON has it
                      for key, value in module._internal_dict.items()}
            tensors = dict(tensors_of(module))
            size = 8 * int(config['sample_size'])
        except Exception as error:      # A damaged or hostile file can raise anything.
            fault = f'is cut off or holds no UNet under "ema" ({type(error).__name__})'
            asked = re.search(r'(?:asks for|GLOBAL) ([\w.]{1,80})', str(error))
            if head[:2] == b'PK' or head[8:9] == b'{':
                fault = 'is a zip or safetensors file'
            elif asked:
                fault = f'asks for {asked[1]}, which no generator needs'
            raise unet.UserError(f'{file} {fault}; give a .pkl of the SiD-LSG authors') from None
    unet.check(config.get('cross_attention_dim') != 1024,
               f'{file} was distilled from Stable Diffusion 2.1; give one distilled from 1.5')
    return unet.from_config(config, tensors, file, torch.float32), size


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('file', type=Path, help='.pkl file released by the SiD-LSG authors')
    parser.add_argument('folder', type=Path, help='folder to write')
    args = parser.parse_args(arguments)
    with unet.user_errors('read_official'):
        unet.check(not args.folder.exists(), f'{args.folder} exists already; give another name')
        net, size = read_generator(args.file)
        facts = {'t_init': 625, 'size': size, 'steps': 1}
        args.folder.parent.mkdir(parents=True, exist_ok=True)
        # We rename the folder once it is complete, so an interruption leaves nothing behind.
        with tempfile.TemporaryDirectory(dir=args.folder.parent, prefix='.new-') as temporary:
            new = Path(temporary) / 'new'
            unet.save(net, new / 'unet', torch.float32)
            (new / 'generator.json').write_text(json.dumps(facts) + '\n')
            new.rename(args.folder)


if __name__ == '__main__':
    main()
