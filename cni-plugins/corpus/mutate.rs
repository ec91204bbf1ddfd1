//! Inputs made from the files of this folder. Part of the tests of several crates, by `#[path]`.

use std::fs;
use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};

/// How often an input is changed.
const CHANGES: usize = 5;

/// The files of a folder, in the order of their names.
pub(crate) fn seeds(folder: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus").join(folder);
    let mut paths: Vec<_> = fs::read_dir(&folder)
        .expect("the corpus is there")
        .map(|entry| entry.expect("readable").path())
        .collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).expect("readable")).collect()
}

/// Bytes of a seed with some replaced, put in or taken away, and perhaps the end of another seed.
#[allow(dead_code, reason = "each crate uses what it has input for")]
pub(crate) fn bytes(folder: &str) -> impl Strategy<Value = Vec<u8>> + use<> {
    let seeds = seeds(folder);
    let change = (0..3_u8, any::<Index>(), any::<u8>());
    let splice = proptest::option::weighted(0.2, any::<(Index, Index, Index)>());
    (any::<Index>(), vec(change, 0..CHANGES), splice).prop_map(move |(seed, changes, splice)| {
        let mut text = seed.get(&seeds).clone();
        for (kind, at, byte) in changes {
            let at = at.index(text.len() + 1);
            match kind {
                0 if at < text.len() => text[at] = byte,
                1 if at < text.len() => drop(text.remove(at)),
                _ => text.insert(at, byte),
            }
        }
        if let Some((other, cut, from)) = splice {
            let other = other.get(&seeds);
            text.truncate(cut.index(text.len() + 1));
            text.extend(&other[from.index(other.len() + 1)..]);
        }
        text
    })
}

/// JSON of a seed with some of its values replaced by odd ones.
#[allow(dead_code, reason = "each crate uses what it has input for")]
pub(crate) fn values(folder: &str) -> impl Strategy<Value = Value> + use<> {
    let seeds: Vec<Value> =
        seeds(folder).iter().map(|text| serde_json::from_slice(text).expect("JSON")).collect();
    (any::<Index>(), vec((any::<Index>(), odd()), 1..CHANGES)).prop_map(move |(seed, changes)| {
        let mut value = seed.get(&seeds).clone();
        for (at, odd) in changes {
            let count = count(&value);
            replace(&mut value, at.index(count), &odd);
        }
        value
    })
}

fn odd() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-2..70_000_i64).prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
        "[0-9a-f.:/-]{0,24}".prop_map(Value::from),
        Just(json!([])),
        Just(json!({})),
        Just(json!([[{}]])),
        Just(json!("x".repeat(5000))),
    ]
}

/// Values inside a value, itself included.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(count).sum(),
        Value::Object(object) => object.values().map(count).sum(),
        _ => 0,
    }
}

/// Replaces the value that comes after `skip` others.
fn replace(value: &mut Value, mut skip: usize, odd: &Value) {
    if skip == 0 {
        *value = odd.clone();
        return;
    }
    skip -= 1;
    let inner: Vec<&mut Value> = match value {
        Value::Array(list) => list.iter_mut().collect(),
        Value::Object(object) => object.values_mut().collect(),
        _ => Vec::new(),
    };
    for inner in inner {
        let size = count(inner);
        if skip < size {
            return replace(inner, skip, odd);
        }
        skip -= size;
    }
}
