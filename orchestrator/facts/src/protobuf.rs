//! Kubernetes' protobuf bodies as JSON.
//!
//! The envelope is `k8s\0` and a `runtime.Unknown` (type meta, raw object). Objects are decoded by the table alone.
//! Go writes every field that is not a pointer, zero or not: what its JSON encoder would leave out is left out here
//! too, so that a JSON and a protobuf client store the same bytes.

use base64::Engine as _;
use serde_json::{Map, Value, json};

use crate::table::{Facts, Field, FieldType, Shape, TypeId};

/// Nesting of the deepest real object is about 12.
const DEPTH_LIMIT: usize = 64;
const MAGIC: &[u8] = b"k8s\0";

/// Why a body cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the body does not start with the Kubernetes magic number")]
    Magic,
    #[error("the body ends too early or is damaged")]
    Damaged,
    #[error("the kind {kind:?} of {api_version:?} is not known here")]
    UnknownKind { api_version: String, kind: String },
    #[error("objects are nested deeper than {DEPTH_LIMIT}")]
    TooDeep,
}

/// Decodes a body, envelope included, into an object with `apiVersion` and `kind`.
///
/// # Errors
/// The body is damaged or of an unknown kind.
pub fn decode(facts: &Facts, body: &[u8]) -> Result<Value, Error> {
    let envelope = body.strip_prefix(MAGIC).ok_or(Error::Magic)?;
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    for field in Reader(envelope) {
        match field? {
            (1, Wire::Bytes(meta)) => {
                for field in Reader(meta) {
                    match field? {
                        (1, Wire::Bytes(text)) => api_version = utf8(text)?,
                        (2, Wire::Bytes(text)) => kind = utf8(text)?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
    let known = facts
        .kind(group, version, &kind)
        .or_else(|| (kind == "DeleteOptions").then(|| facts.kind_anywhere(&kind)).flatten())
        .ok_or_else(|| Error::UnknownKind {
            api_version: api_version.clone(),
            kind: kind.clone(),
        })?;
    let mut object = message(facts, known, raw, 0)?;
    object.insert("apiVersion".to_owned(), json!(api_version));
    object.insert("kind".to_owned(), json!(kind));
    Ok(Value::Object(object))
}

fn utf8(bytes: &[u8]) -> Result<String, Error> {
    String::from_utf8(bytes.to_vec()).map_err(|_| Error::Damaged)
}

enum Wire<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
    Fixed32(u32),
}

/// The fields of a message in the order they were written.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn varint(&mut self) -> Result<u64, Error> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (first, rest) = self.0.split_first().ok_or(Error::Damaged)?;
            self.0 = rest;
            value |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Error::Damaged)
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Error> {
        let (head, rest) = self.0.split_at_checked(count).ok_or(Error::Damaged)?;
        self.0 = rest;
        Ok(head)
    }

    fn field(&mut self) -> Result<(u32, Wire<'a>), Error> {
        let key = self.varint()?;
        let number = u32::try_from(key >> 3).map_err(|_| Error::Damaged)?;
        let wire = match key & 7 {
            0 => Wire::Varint(self.varint()?),
            1 => Wire::Fixed64(u64::from_le_bytes(
                self.take(8)?.try_into().map_err(|_| Error::Damaged)?,
            )),
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| Error::Damaged)?;
                Wire::Bytes(self.take(length)?)
            }
            5 => Wire::Fixed32(u32::from_le_bytes(
                self.take(4)?.try_into().map_err(|_| Error::Damaged)?,
            )),
            _ => return Err(Error::Damaged),
        };
        Ok((number, wire))
    }
}

impl<'a> Iterator for Reader<'a> {
    type Item = Result<(u32, Wire<'a>), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

fn message(
    facts: &Facts,
    id: TypeId,
    bytes: &[u8],
    depth: usize,
) -> Result<Map<String, Value>, Error> {
    if depth > DEPTH_LIMIT {
        return Err(Error::TooDeep);
    }
    let Shape::Fields(fields) = &facts.get(id).shape else { return Ok(Map::new()) };
    let mut object = Map::new();
    for item in Reader(bytes) {
        let (number, wire) = item?;
        // A field of a newer version: Go ignores it too.
        let Some(field) = fields.iter().find(|field| field.number == number && number > 0) else {
            continue;
        };
        if field.json.is_empty() {
            if let (FieldType::Message(inner), Wire::Bytes(bytes)) = (&field.kind, wire) {
                object.extend(message(facts, *inner, bytes, depth + 1)?);
            }
            continue;
        }
        match &field.kind {
            FieldType::List(item) => {
                let list = object.entry(field.json.clone()).or_insert_with(|| json!([]));
                if let Some(list) = list.as_array_mut() {
                    push(facts, item, wire, depth, list)?;
                }
            }
            FieldType::Map(value) => {
                if let Wire::Bytes(entry) = wire {
                    let (key, value) = entry_of(facts, value, entry, depth)?;
                    object.entry(field.json.clone()).or_insert_with(|| json!({}))[key] = value;
                }
            }
            kind => {
                let value = scalar(facts, kind, wire, depth)?;
                if !omitted(field, &value) {
                    object.insert(field.json.clone(), value);
                }
            }
        }
    }
    Ok(object)
}

/// Whether Go's JSON encoder leaves this value out, or clients mean nothing by it.
fn omitted(field: &Field, value: &Value) -> bool {
    if field.pointer {
        return value.is_null();
    }
    match value {
        Value::Null => true,
        Value::String(text) => field.omit_empty && text.is_empty(),
        Value::Bool(flag) => field.omit_empty && !flag,
        Value::Number(number) => field.omit_empty && number.as_f64() == Some(0.0),
        // `status: {}` and `metadata: {}` are written by Go; they say nothing.
        Value::Object(map) => field.omit_empty && map.is_empty(),
        Value::Array(_) => false,
    }
}

fn push(
    facts: &Facts,
    item: &FieldType,
    wire: Wire<'_>,
    depth: usize,
    list: &mut Vec<Value>,
) -> Result<(), Error> {
    // Numbers may come packed.
    let packed = matches!(item, FieldType::Int32 | FieldType::Int64 | FieldType::Bool);
    match wire {
        Wire::Bytes(bytes) if packed => {
            let mut reader = Reader(bytes);
            while !reader.0.is_empty() {
                let number = reader.varint()?;
                list.push(scalar(facts, item, Wire::Varint(number), depth)?);
            }
        }
        wire => list.push(scalar(facts, item, wire, depth)?),
    }
    Ok(())
}

fn entry_of(
    facts: &Facts,
    kind: &FieldType,
    entry: &[u8],
    depth: usize,
) -> Result<(String, Value), Error> {
    let (mut key, mut value) = (String::new(), None);
    for field in Reader(entry) {
        match field? {
            (1, Wire::Bytes(text)) => key = utf8(text)?,
            (2, wire) => value = Some(scalar(facts, kind, wire, depth)?),
            _ => {}
        }
    }
    let empty = || match kind {
        FieldType::String | FieldType::Bytes => json!(""),
        FieldType::Message(_) => json!({}),
        _ => Value::Null,
    };
    Ok((key, value.unwrap_or_else(empty)))
}

fn scalar(facts: &Facts, kind: &FieldType, wire: Wire<'_>, depth: usize) -> Result<Value, Error> {
    Ok(match (kind, wire) {
        (FieldType::String, Wire::Bytes(bytes)) => json!(utf8(bytes)?),
        (FieldType::Bool, Wire::Varint(value)) => json!(value != 0),
        (FieldType::Int32, Wire::Varint(value)) => {
            json!(i32::try_from(value.cast_signed()).map_err(|_| Error::Damaged)?)
        }
        (FieldType::Int64, Wire::Varint(value)) => json!(value.cast_signed()),
        (FieldType::Float, Wire::Fixed64(value)) => json!(f64::from_bits(value)),
        (FieldType::Float, Wire::Fixed32(value)) => json!(f32::from_bits(value)),
        (FieldType::Bytes, Wire::Bytes(bytes)) => {
            json!(base64::engine::general_purpose::STANDARD.encode(bytes))
        }
        (FieldType::Quantity, Wire::Bytes(bytes)) => json!(text_field(bytes, 1)?),
        (FieldType::IntOrString, Wire::Bytes(bytes)) => int_or_string(bytes)?,
        (FieldType::Time, Wire::Bytes(bytes)) => time(bytes, false)?,
        (FieldType::MicroTime, Wire::Bytes(bytes)) => time(bytes, true)?,
        (FieldType::Raw | FieldType::Fields, Wire::Bytes(bytes)) => {
            let raw = Reader(bytes).find_map(|field| match field {
                Ok((1, Wire::Bytes(raw))) => Some(raw),
                _ => None,
            });
            raw.and_then(|raw| serde_json::from_slice(raw).ok()).unwrap_or(Value::Null)
        }
        (FieldType::Message(id), Wire::Bytes(bytes)) => match &facts.get(*id).shape {
            Shape::Fields(_) => Value::Object(message(facts, *id, bytes, depth + 1)?),
            Shape::NamedList(kind) => {
                let FieldType::List(item) = kind else { return Err(Error::Damaged) };
                let mut list = Vec::new();
                for field in Reader(bytes) {
                    if let (1, wire) = field? {
                        push(facts, item, wire, depth + 1, &mut list)?;
                    }
                }
                Value::Array(list)
            }
        },
        _ => return Err(Error::Damaged),
    })
}

fn text_field(bytes: &[u8], wanted: u32) -> Result<String, Error> {
    for field in Reader(bytes) {
        if let (number, Wire::Bytes(text)) = field?
            && number == wanted
        {
            return utf8(text);
        }
    }
    Ok(String::new())
}

fn int_or_string(bytes: &[u8]) -> Result<Value, Error> {
    let (mut is_text, mut number, mut text) = (false, 0_i64, String::new());
    for field in Reader(bytes) {
        match field? {
            (1, Wire::Varint(kind)) => is_text = kind == 1,
            (2, Wire::Varint(value)) => number = value.cast_signed(),
            (3, Wire::Bytes(bytes)) => text = utf8(bytes)?,
            _ => {}
        }
    }
    Ok(if is_text { json!(text) } else { json!(number) })
}

/// Seconds and nanoseconds as RFC 3339; the zero time is no time.
fn time(bytes: &[u8], micro: bool) -> Result<Value, Error> {
    let (mut seconds, mut nanos) = (0_i64, 0_i32);
    for field in Reader(bytes) {
        match field? {
            (1, Wire::Varint(value)) => seconds = value.cast_signed(),
            (2, Wire::Varint(value)) => {
                nanos = i32::try_from(value.cast_signed()).map_err(|_| Error::Damaged)?
            }
            _ => {}
        }
    }
    // Go's zero time is the year 1.
    if (seconds == 0 && nanos == 0) || seconds <= -62_135_596_800 {
        return Ok(Value::Null);
    }
    let time = jiff::Timestamp::new(seconds, nanos).map_err(|_| Error::Damaged)?;
    let format = if micro { "%Y-%m-%dT%H:%M:%S%.6fZ" } else { "%Y-%m-%dT%H:%M:%SZ" };
    Ok(json!(time.strftime(format).to_string()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::facts;

    fn field(number: u64, bytes: &[u8]) -> Vec<u8> {
        let mut out = varint(number << 3 | 2);
        out.extend(varint(bytes.len() as u64));
        out.extend(bytes);
        out
    }

    fn varint(mut value: u64) -> Vec<u8> {
        let mut out = Vec::new();
        loop {
            let byte = (value & 0x7f) as u8;
            value >>= 7;
            if value == 0 {
                out.push(byte);
                return out;
            }
            out.push(byte | 0x80);
        }
    }

    fn number(number: u64, value: u64) -> Vec<u8> {
        [varint(number << 3), varint(value)].concat()
    }

    fn envelope(api_version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
        let meta = [field(1, api_version.as_bytes()), field(2, kind.as_bytes())].concat();
        [MAGIC.to_vec(), field(1, &meta), field(2, raw)].concat()
    }

    #[test]
    fn a_deployment_as_go_writes_it() {
        let metadata = [field(1, b"web"), field(2, b""), field(8, &[]), number(7, 0)].concat();
        let limits = field(1, &[field(1, b"cpu"), field(2, &field(1, b"500m"))].concat());
        let port = [field(1, b""), number(2, 0), number(3, 8080), field(4, b"TCP"), field(5, b"")]
            .concat();
        let container =
            [field(1, b"a"), field(2, b"img"), field(6, &port), field(8, &limits)].concat();
        let template = [field(1, &field(1, b"")), field(2, &field(2, &container))].concat();
        let surge = [number(1, 1), number(2, 0), field(3, b"25%")].concat();
        let strategy = [field(1, b"RollingUpdate"), field(2, &field(2, &surge))].concat();
        let spec = [number(1, 0), field(3, &template), field(4, &strategy), number(5, 0)].concat();
        let body = envelope(
            "apps/v1",
            "Deployment",
            &[field(1, &metadata), field(2, &spec), field(3, &number(1, 0))].concat(),
        );
        let object = decode(facts(), &body).expect("a Deployment");
        assert_eq!(object["metadata"], json!({ "name": "web" }));
        assert_eq!(object["spec"]["replicas"], 0, "a pointer field keeps its zero");
        assert!(object["spec"].get("minReadySeconds").is_none());
        let container = &object["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["ports"], json!([{ "containerPort": 8080, "protocol": "TCP" }]));
        assert_eq!(container["resources"]["limits"]["cpu"], "500m");
        assert_eq!(object["spec"]["strategy"]["rollingUpdate"]["maxSurge"], "25%");
    }

    #[test]
    fn secrets_are_base64_and_volumes_are_inlined() {
        let data = [field(1, b"key"), field(2, b"\x00\xff")].concat();
        let object =
            decode(facts(), &envelope("v1", "Secret", &field(2, &data))).expect("a Secret");
        assert_eq!(object["data"]["key"], "AP8=");
        let source = field(19, &field(1, &field(1, b"cm")));
        let volume = [field(1, b"v"), field(2, &source)].concat();
        let object =
            decode(facts(), &envelope("v1", "Pod", &field(2, &field(1, &volume)))).expect("a Pod");
        assert_eq!(
            object["spec"]["volumes"][0],
            json!({ "name": "v", "configMap": { "name": "cm" } })
        );
    }

    #[test]
    fn what_is_not_known_is_named() {
        let error =
            decode(facts(), &envelope("v1", "Widget", b"")).expect_err("unknown").to_string();
        assert_eq!(error, "the kind \"Widget\" of \"v1\" is not known here");
        assert_eq!(decode(facts(), b"{}"), Err(Error::Magic));
    }

    proptest! {
        #[test]
        fn fuzz_no_bytes_make_it_panic(raw in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(facts(), &envelope("v1", "Pod", &raw));
            let _ = decode(facts(), &raw);
        }
    }
}
