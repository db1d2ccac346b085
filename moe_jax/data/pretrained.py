"""Tokenizers from elsewhere: of Hugging Face, of SentencePiece."""

from collections.abc import Mapping
import itertools
import json
import re
from typing import Any

from etils import epath
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from moe_jax.data import prepared
from moe_jax.data.documents import reading_with_any_library
from moe_jax.data.tokenizer import END_OF_DOCUMENT, Tokenizer

# What public tokenizers end a document with, the more telling ones first.
_ENDS = (
  END_OF_DOCUMENT,
  '<|end_of_text|>',
  '<eos>',
  '</s>',
  '[SEP]',
  '<\uff5cend\u2581of\u2581sentence\uff5c>',
)


def open_tokenizer(path: str) -> Tokenizer:
  """Reads a tokenizer as it was published.

  Args:
    path: of a tokenizer.json, of a SentencePiece model (.model), or of a folder
      that has one of these, as Hugging Face's libraries save it; local or
      gs://...

  Returns:
    The tokenizer; its vocabulary is as large as its ids need. A document ends
    with the token that tokenizer_config.json calls eos_token, else with one
    that is known to mean this, else with one that is added. Its `beginning` is
    the bos_token if add_bos_token is true, else what tokenizer.json adds.

  Raises:
    ValueError: the file is missing or is no tokenizer.
  """
  where = f'--tokenizer={path}'
  file = prepared.open_directory('--tokenizer', path)
  with reading_with_any_library(where):
    config = {}
    if file.is_dir():
      config = _config(file / 'tokenizer_config.json')
      file = _file_in(file)
    if file.suffix == '.model':
      model = _from_sentencepiece(file.read_bytes())
    else:
      model = _from_json(file.read_bytes().decode())
    # Published ones may cut each text at 512 tokens, or fill it up.
    model.no_truncation()
    model.no_padding()
    ids = model.get_vocab()
    named = _token(config, 'eos_token')
    known = [token for token in (named, *_ENDS) if token in ids]
    end = known[0] if known else END_OF_DOCUMENT
    if not known:
      model.add_special_tokens([END_OF_DOCUMENT])
    vocabulary = max(model.get_vocab().values()) + 1
    return Tokenizer(model, vocabulary, end, _beginning(model, config, end))


def _file_in(folder: epath.Path) -> epath.Path:
  for name in ('tokenizer.json', 'tokenizer.model', 'spiece.model'):
    if (folder / name).is_file():
      return folder / name
  raise ValueError(
    'this folder has no tokenizer.json, tokenizer.model or spiece.model; save '
    'the tokenizer in the fast format'
  )


def _config(file: epath.Path) -> dict[str, Any]:
  """Returns what a tokenizer_config.json says, or nothing."""
  config = json.loads(file.read_bytes()) if file.is_file() else {}
  return config if isinstance(config, dict) else {}


def _token(config: Mapping[str, Any], name: str) -> str:
  """Returns the token that has a name there, or nothing."""
  token = config.get(name)
  token = token.get('content') if isinstance(token, dict) else token
  return token if isinstance(token, str) else ''


def _beginning(
  model: tokenizers.Tokenizer, config: Mapping[str, Any], end: str
) -> list[int]:
  """Returns the ids that come before a text without being asked for."""
  if config.get('add_bos_token') is not None:
    bos = model.token_to_id(_token(config, 'bos_token'))
    return [bos] if config['add_bos_token'] and bos is not None else []
  added = model.encode('').ids  # Before and after the text.
  return list(itertools.takewhile(model.token_to_id(end).__ne__, added))


def _from_json(text: str) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_str(text)
  except Exception as error:  # The library raises no narrower type.
    raise ValueError(f'not a tokenizer.json: {error}') from error


def _from_sentencepiece(data: bytes) -> tokenizers.Tokenizer:
  """Builds what encodes as SentencePiece does."""
  try:
    from sentencepiece import sentencepiece_model_pb2
  except ImportError as error:
    raise ValueError(
      "needs the extra of SentencePiece: pip install 'moe_jax[sentencepiece]'"
    ) from error
  proto = sentencepiece_model_pb2.ModelProto()
  try:
    proto.ParseFromString(data)
  except Exception as error:  # protobuf's, which is not public.
    raise ValueError('not a SentencePiece model') from error
  kinds, rules = proto.SentencePiece, proto.normalizer_spec
  symbols = [x.piece for x in proto.pieces if x.type == kinds.USER_DEFINED]
  tokenizer = tokenizers.Tokenizer(_model(proto, ignore_merges=bool(symbols)))
  steps = []
  if rules.precompiled_charsmap:
    steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
  if rules.remove_extra_whitespaces:
    steps += [
      normalizers.Strip(),
      normalizers.Replace(tokenizers.Regex(' {2,}'), ' '),
    ]
  if steps:
    tokenizer.normalizer = normalizers.Sequence(steps)
  prepend = 'always' if rules.add_dummy_prefix else 'never'
  space = {'replacement': '\u2581', 'prepend_scheme': prepend}
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**space, split=False)
  if symbols:
    # As added tokens they would be cut out before spaces are put and removed.
    longest_first = sorted(symbols, key=len, reverse=True)
    symbol = tokenizers.Regex('|'.join(map(re.escape, longest_first)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
      [
        tokenizer.pre_tokenizer,
        pre_tokenizers.Split(symbol, 'isolated'),
      ]
    )
  tokenizer.decoder = decoders.Sequence(
    [decoders.ByteFallback(), decoders.Metaspace(**space)]
  )
  tokenizer.add_special_tokens(
    [
      piece.piece
      for piece in proto.pieces
      if piece.type in (kinds.CONTROL, kinds.UNKNOWN)
    ]
  )
  return tokenizer


def _model(proto: Any, ignore_merges: bool) -> models.Model:
  """Builds the model of a SentencePiece model.

  Args:
    proto: the SentencePiece model.
    ignore_merges: whether a text that is a piece is that token; symbols are not
      merged of others.
  """
  pieces = [(piece.piece, piece.score) for piece in proto.pieces]
  if not pieces:
    raise ValueError('not a SentencePiece model: it has no pieces')
  trainer = proto.trainer_spec
  if trainer.model_type == trainer.UNIGRAM:
    return models.Unigram(
      pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback
    )
  if trainer.model_type == trainer.BPE:
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    return models.BPE(
      ids,
      _merges(ids),
      unk_token=trainer.unk_piece,
      fuse_unk=True,
      byte_fallback=trainer.byte_fallback,
      ignore_merges=ignore_merges,
    )
  raise ValueError('a SentencePiece model that is neither unigram nor BPE')


def _merges(ids: dict[str, int]) -> list[tuple[str, str]]:
  """Returns every way to make a piece of two; pieces come by their rank."""
  merges = []
  for piece in ids:
    parts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
    both = [(a, b) for a, b in parts if a in ids and b in ids]
    merges += sorted(both, key=lambda ab: (ids[ab[0]], ids[ab[1]]))
  return merges
