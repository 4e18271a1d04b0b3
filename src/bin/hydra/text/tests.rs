//! Which models of a job share a text, and for how long.

use super::*;
use crate::job::Job;
use crate::setup::{Prepared, prepare};
use std::path::Path;

/// A folder with two texts, and the fixture's tokenizer in both forms: `bpe` has both, `two` the two files.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for name in ["a.txt", "b.txt"] {
        fs::write(root.join(name), " the cat".repeat(100)).unwrap();
    }
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bpe");
    for (to, names) in [("bpe", &["tokenizer.json"][..]), ("two", &["vocab.json", "merges.txt"])] {
        fs::create_dir(root.join(to)).unwrap();
        names.iter().for_each(|name| _ = fs::copy(fixture.join(name), root.join(to).join(name)).unwrap());
    }
    folder
}

/// How many read each text that is read at all, the fewest first.
fn readers(texts: &Texts) -> Vec<usize> {
    let mut readers: Vec<usize> = texts.read.borrow().values().map(Weak::strong_count).filter(|&n| n > 0).collect();
    readers.sort();
    readers
}

/// Prepares a job with a model for each of `models`: its data and what else there is to say.
fn prepared(folder: &Path, texts: &Texts, models: &[&str]) -> Vec<Prepared> {
    let model = |(i, data): (usize, &&str)| {
        format!(
            "[[model]]\nname = 'm{i}'\nfamily = 'gpt2'\nconfig = {{ n_layer = 1, n_embd = 8, n_head = 2, n_positions = 16, bos_token_id = 0, eos_token_id = 0 }}\nsteps = 2\n{data}\n"
        )
    };
    let path = folder.join("job.toml");
    fs::write(&path, models.iter().enumerate().map(model).collect::<String>()).unwrap();
    let job = Job::load(&path, &[]).unwrap();
    (0..job.models.len()).map(|i| prepare(&job, i, texts).unwrap()).collect()
}

#[test]
fn models_that_read_the_same_share_it() {
    let check = |models: &[&str], want: &[usize]| {
        let (folder, texts) = (folder(), Texts::default());
        let prepared = prepared(folder.path(), &texts, models);
        assert_eq!(readers(&texts), want, "{models:?}");
        drop(prepared);
        assert!(readers(&texts).is_empty(), "{models:?}");
    };
    let bytes = "data = { text = 'a.txt', tokenizer = 'bytes', context = 16 }";
    let (bpe, other) = (bytes.replace("bytes", "bpe"), bytes.replace("a.txt", "b.txt"));
    let by_another_way = bytes.replace("a.txt", "bpe/../a.txt").replace("16", "8");
    check(&[bytes, bytes, &by_another_way], &[3]);
    check(&[bytes, &other, &bpe], &[1, 1, 1]);
    check(&[&bpe, &bytes.replace("bytes", "two")], &[1, 1]);
    check(&[&bpe, &bytes.replace("bytes", "bpe/tokenizer.json")], &[2]);
    check(&[&bytes.replace("'a.txt'", "['a.txt', 'b.txt']"), &bytes.replace("'a.txt'", "['b.txt', 'a.txt']")], &[1, 1]);
    // Held-out text: of its own, a part of what is trained on, and another model's training data.
    let held_out = format!("{bytes}\nvalid = {{ text = 'b.txt' }}");
    check(&[&held_out, &held_out], &[2, 2]);
    check(&[&held_out, &other], &[1, 2]);
    check(&[&format!("{bytes}\nvalid = {{ fraction = 0.5 }}"), bytes], &[3]);
}

#[test]
fn one_who_comes_later_reads_along() {
    let (folder, texts) = (folder(), Texts::default());
    let model = ["data = { text = 'a.txt', tokenizer = 'bytes', context = 16 }"];
    let first = prepared(folder.path(), &texts, &model).remove(0);
    let first = first.sources(&texts).unwrap();
    let later = prepared(folder.path(), &texts, &model).remove(0);
    assert_eq!(readers(&texts), [2]);
    drop(first);
    // Opened again while it is read, as by a run that goes on.
    let (once, twice) = (later.sources(&texts).unwrap(), later.sources(&texts).unwrap());
    assert_eq!(readers(&texts), [2]);
    drop((once, twice));
    assert!(readers(&texts).is_empty());
    let closed = prepared(folder.path(), &texts, &model).remove(0);
    closed.close();
    assert!(readers(&texts).is_empty());
}

#[test]
fn kept_texts_stay() {
    let (folder, texts) = (folder(), Texts::kept());
    let path = folder.path().join("a.txt");
    let first = Arc::as_ptr(&texts.open(std::slice::from_ref(&path), None).unwrap());
    fs::write(&path, "another text").unwrap();
    assert_eq!(Arc::as_ptr(&texts.open(&[path], None).unwrap()), first);
}

#[test]
fn added_tokens_make_another_text_of_the_same_files() {
    let (folder, texts) = (folder(), Texts::default());
    let open = || {
        let tokenizer = Tokenizers::default().open(&folder.path().join("two")).unwrap();
        (texts.open(&[folder.path().join("a.txt")], tokenizer.as_ref()).unwrap(), tokenizer.unwrap())
    };
    let (text, tokenizer) = open();
    fs::write(folder.path().join("two/added_tokens.json"), r#"{"<x>": 260}"#).unwrap();
    let (more, other) = open();
    assert_ne!(tokenizer.identity, other.identity);
    assert_eq!((text.vocab(), more.vocab()), (260, 261));
}

#[test]
fn a_text_at_fault_is_told_each_time() {
    let (folder, texts) = (folder(), Texts::default());
    let paths = [folder.path().join("none.txt")];
    for _ in 0..2 {
        assert!(texts.open(&paths, None).err().unwrap().to_string().contains("none.txt: no such file"));
    }
    fs::write(&paths[0], "there").unwrap();
    assert!(texts.open(&paths, None).is_ok());
}
