//! Own tokenizers: every width of ids, files in order whatever the threads, and what is said of those at fault.

use super::*;
use crate::data::{Batch, Source, TextOptions, TextSource, names};
use std::fs;

/// Each byte `b` is the token `vocab - 1 - b`. Files that begin with `?` are refused, one that begins with `!` has a
/// token too high.
#[derive(Debug)]
struct Down {
    vocab: usize,
}

impl Encode for Down {
    fn vocab(&self) -> usize {
        self.vocab
    }

    fn encode(&self, text: &[u8]) -> Result<Vec<u32>> {
        match text.first() {
            Some(b'?') => Err(Error::bad("is a question")),
            Some(b'!') => Ok(vec![0, self.vocab as u32]),
            _ => Ok(text.iter().map(|&b| (self.vocab - 1) as u32 - u32::from(b)).collect()),
        }
    }
}

fn down(vocab: usize) -> Tokenizer {
    Tokenizer::Own(Arc::new(Down { vocab }))
}

/// A folder with these files: 00.txt, 01.txt and so on.
fn folder(texts: &[Vec<u8>]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (i, text) in texts.iter().enumerate() {
        fs::write(folder.path().join(format!("{i:02}.txt")), text).unwrap();
    }
    folder
}

/// The tokens of a folder, read by a pool of `threads`.
fn read(folder: &Path, tokenizer: &Tokenizer, threads: usize) -> Result<Vec<i32>> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let tokens = pool.install(|| Tokens::read(&[folder.to_path_buf()], tokenizer))?;
    let len = tokens.len();
    let (mut ids, mut labels) = (vec![0; len - 1], vec![0; len - 1]);
    tokens.window(0, &mut ids, &mut labels);
    assert_eq!(ids[1..], labels[..len - 2]);
    ids.push(labels[len - 2]);
    Ok(ids)
}

#[test]
fn every_width_holds_its_highest_token() {
    let folder = folder(&[vec![0, 1, 255, 0]]);
    let texts = [folder.path().to_path_buf()];
    for (vocab, bytes) in [(256, 1), (257, 2), (50_257, 2), (65_536, 2), (65_537, 4), (i32::MAX as usize, 4)] {
        let top = vocab as i32 - 1;
        assert_eq!(read(folder.path(), &down(vocab), 1).unwrap(), [top, top - 1, top - 255, top], "{vocab}");
        let width = match Tokens::read(&texts, &down(vocab)).unwrap() {
            Tokens::U8(_) => 1,
            Tokens::U16(_) => 2,
            Tokens::U32(_) => 4,
        };
        assert_eq!(width, bytes, "{vocab}");
    }
}

#[test]
fn files_keep_their_order_whatever_the_threads() {
    // The first ones take longest, so that threads finish the other way round.
    let texts: Vec<Vec<u8>> = (0..40u8).map(|i| vec![i; 60_000 >> (i / 2)]).collect();
    let folder = folder(&texts);
    let want: Vec<i32> = texts.concat().into_iter().map(|b| 299 - i32::from(b)).collect();
    for threads in [1, 2, 7] {
        assert_eq!(read(folder.path(), &down(300), threads).unwrap(), want, "{threads} threads");
    }
}

#[test]
fn the_first_file_at_fault_is_named() {
    let texts = |tail: &[&str]| -> Vec<Vec<u8>> {
        ["fine ".repeat(20_000).as_str()].iter().chain(tail).map(|text| text.as_bytes().to_vec()).collect()
    };
    for (tail, says) in [
        (["fine", "?", "!"], "02.txt: is a question"),
        (["!", "?", "fine"], "01.txt: token 1 is 300, beyond the tokenizer's vocabulary of 300"),
    ] {
        let folder = folder(&texts(&tail));
        for threads in [1, 4] {
            let error = read(folder.path(), &down(300), threads).unwrap_err();
            assert!(matches!(error, Error::BadInput(_)) && error.to_string().ends_with(says), "{error}");
        }
    }
    let folder = folder(&texts(&[]));
    for vocab in [0, i32::MAX as usize + 1] {
        let error = read(folder.path(), &down(vocab), 1).unwrap_err().to_string();
        assert!(error.contains(&format!("a vocabulary of {vocab}")), "{error}");
    }
}

#[test]
fn windows_are_of_tokens() {
    let folder = folder(&[(0..=254).collect()]);
    let text = Text::read(&[folder.path().to_path_buf()], &down(1000)).unwrap();
    let options = TextOptions { context: 7, batch: 3, seed: 1, valid_fraction: 0.1 };
    let split = TextSource::open(&text, &options).unwrap();
    assert_eq!((split.train.spec().vocab, split.train.spec().classes), (Some(1000), Some(1000)));
    let mut batch = Batch::default();
    let mut valid = split.valid.unwrap();
    valid.fill(0, &mut batch).unwrap();
    let of = |name| batch.get(name).unwrap().as_i32()[..7].to_vec();
    // 36 windows of which 4 are held out: those begin at token 32 * 7 + 1, which is 999 - 225.
    assert_eq!(of(names::INPUT_IDS), (0..7).map(|t| 774 - t).collect::<Vec<_>>());
    assert_eq!(of(names::LABELS), (0..7).map(|t| 773 - t).collect::<Vec<_>>());
    let long = TextOptions { context: 90, ..options };
    let error = TextSource::open(&text, &long).err().expect("too short").to_string();
    assert!(error.contains("the text has 255 tokens; batch 3 of context 90"), "{error}");
}
