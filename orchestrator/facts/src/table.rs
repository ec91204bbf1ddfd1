//! The table in memory.

use std::collections::HashMap;
use std::sync::LazyLock;

use serde_json::Value;

static TEXT: &str = concat!(
    include_str!("../k8s-1.36.facts"),
    include_str!("../network-policy-api-v1alpha2.facts")
);

/// The facts, read once.
#[must_use]
pub fn facts() -> &'static Facts {
    static FACTS: LazyLock<Facts> = LazyLock::new(|| match Facts::parse(TEXT) {
        Ok(facts) => facts,
        // The file is part of the program and a test reads it.
        Err(error) => unreachable!("the built-in facts are damaged: {error}"),
    });
    &FACTS
}

/// A type in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TypeId(usize);

/// Type of a field's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FieldType {
    String,
    Bool,
    Int32,
    Int64,
    Float,
    /// base64 in JSON.
    Bytes,
    Quantity,
    IntOrString,
    /// RFC 3339, seconds.
    Time,
    /// RFC 3339, microseconds.
    MicroTime,
    /// Any object.
    Raw,
    /// Any object (`managedFields`).
    Fields,
    Message(TypeId),
    List(Box<FieldType>),
    /// Keys are strings.
    Map(Box<FieldType>),
}

/// One field of a type.
#[derive(Debug, Clone)]
pub struct Field {
    /// Name in JSON; empty = the fields of the message stand here themselves.
    pub json: String,
    /// Protobuf field number; 0 = none.
    pub number: u32,
    pub kind: FieldType,
    pub omit_empty: bool,
    pub pointer: bool,
    pub required: bool,
    pub default: Option<Value>,
    pub merge_key: Option<String>,
    /// `merge`, `replace`, `retainKeys`, `merge,retainKeys`.
    pub strategy: Option<String>,
    pub list_type: Option<String>,
    pub list_keys: Vec<String>,
    pub atomic_map: bool,
}

/// What a type is made of.
#[derive(Debug, Clone)]
pub enum Shape {
    Fields(Vec<Field>),
    /// A list in JSON, a message with the list as field 1 in protobuf.
    NamedList(FieldType),
}

/// One type.
#[derive(Debug, Clone)]
pub struct Type {
    /// `io.k8s.api.core.v1.PodSpec`.
    pub name: String,
    /// Group, version and kind.
    pub kind: Option<(String, String, String)>,
    pub shape: Shape,
}

/// All types.
#[derive(Debug)]
pub struct Facts {
    types: Vec<Type>,
    kinds: HashMap<(String, String, String), TypeId>,
}

impl Facts {
    /// The type of a kind.
    #[must_use]
    pub fn kind(&self, group: &str, version: &str, kind: &str) -> Option<TypeId> {
        self.kinds.get(&(group.to_owned(), version.to_owned(), kind.to_owned())).copied()
    }

    /// The type of a kind, wherever it is: `DeleteOptions` goes by many group-versions.
    #[must_use]
    pub fn kind_anywhere(&self, kind: &str) -> Option<TypeId> {
        self.kinds.iter().find(|((_, _, known), _)| known == kind).map(|(_, id)| *id)
    }

    #[must_use]
    pub fn get(&self, id: TypeId) -> &Type {
        &self.types[id.0]
    }

    /// The fields of a type, those of inlined messages among them.
    pub fn fields(&self, id: TypeId) -> Vec<&Field> {
        let Shape::Fields(fields) = &self.get(id).shape else { return Vec::new() };
        let mut all = Vec::new();
        for field in fields {
            match &field.kind {
                FieldType::Message(inner) if field.json.is_empty() => {
                    all.extend(self.fields(*inner))
                }
                _ => all.push(field),
            }
        }
        all
    }

    /// A field by its name in JSON.
    #[must_use]
    pub fn field(&self, id: TypeId, json: &str) -> Option<&Field> {
        let Shape::Fields(fields) = &self.get(id).shape else { return None };
        fields.iter().find_map(|field| match &field.kind {
            FieldType::Message(inner) if field.json.is_empty() => self.field(*inner, json),
            _ => (field.json == json).then_some(field),
        })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut names: HashMap<&str, TypeId> = HashMap::new();
        for name in text
            .lines()
            .filter_map(|line| line.strip_prefix("T "))
            .filter_map(|rest| rest.split(' ').next())
        {
            let next = TypeId(names.len());
            names.insert(name, next);
        }
        let mut facts = Self { types: Vec::new(), kinds: HashMap::new() };
        for line in text.lines() {
            let (tag, rest) = line.split_once(' ').unwrap_or((line, ""));
            let words: Vec<&str> = rest.split(' ').collect();
            match tag {
                "T" => {
                    let kind = match words.as_slice() {
                        [_, group, version, kind] => {
                            let group = if *group == "-" { "" } else { group };
                            Some((group.to_owned(), (*version).to_owned(), (*kind).to_owned()))
                        }
                        _ => None,
                    };
                    if let Some(kind) = &kind {
                        facts.kinds.insert(kind.clone(), TypeId(facts.types.len()));
                    }
                    let name = words.first().copied().unwrap_or_default().to_owned();
                    facts.types.push(Type { name, kind, shape: Shape::Fields(Vec::new()) });
                }
                "N" => {
                    let current = facts.types.last_mut().ok_or("a list before its type")?;
                    current.shape = Shape::NamedList(parse_type(rest, &names)?);
                }
                "f" => {
                    let field = parse_field(&words, &names)?;
                    match facts.types.last_mut().map(|current| &mut current.shape) {
                        Some(Shape::Fields(fields)) => fields.push(field),
                        _ => return Err(format!("a field outside of a type: {line}")),
                    }
                }
                "#" | "" => {}
                _ => return Err(format!("unknown line {line}")),
            }
        }
        Ok(facts)
    }
}

fn parse_type(text: &str, names: &HashMap<&str, TypeId>) -> Result<FieldType, String> {
    if let Some(item) = text.strip_prefix("[]") {
        return Ok(FieldType::List(Box::new(parse_type(item, names)?)));
    }
    if let Some(value) = text.strip_prefix("{}") {
        return Ok(FieldType::Map(Box::new(parse_type(value, names)?)));
    }
    if let Some(name) = text.strip_prefix('@') {
        return names
            .get(name)
            .map(|id| FieldType::Message(*id))
            .ok_or_else(|| format!("unknown type {name}"));
    }
    Ok(match text {
        "s" => FieldType::String,
        "b" => FieldType::Bool,
        "i32" => FieldType::Int32,
        "i64" => FieldType::Int64,
        "f64" => FieldType::Float,
        "y" => FieldType::Bytes,
        "q" => FieldType::Quantity,
        "ios" => FieldType::IntOrString,
        "t" => FieldType::Time,
        "mt" => FieldType::MicroTime,
        "raw" => FieldType::Raw,
        "fv1" => FieldType::Fields,
        other => return Err(format!("unknown type {other}")),
    })
}

fn parse_field(words: &[&str], names: &HashMap<&str, TypeId>) -> Result<Field, String> {
    let [json, number, kind, flags @ ..] = words else {
        return Err(format!("short field {words:?}"));
    };
    let mut field = Field {
        json: if *json == "-" { String::new() } else { (*json).to_owned() },
        number: number.parse().map_err(|_| format!("number {number}"))?,
        kind: parse_type(kind, names)?,
        omit_empty: false,
        pointer: false,
        required: false,
        default: None,
        merge_key: None,
        strategy: None,
        list_type: None,
        list_keys: Vec::new(),
        atomic_map: false,
    };
    for flag in flags {
        match flag.split_once('=') {
            None => match *flag {
                "o" => field.omit_empty = true,
                "p" => field.pointer = true,
                "r" => field.required = true,
                "x" => field.atomic_map = true,
                other => return Err(format!("unknown flag {other}")),
            },
            Some(("d", value)) => field.default = serde_json::from_str(value).ok(),
            Some(("m", value)) => field.merge_key = Some(value.to_owned()),
            Some(("s", value)) => field.strategy = Some(value.to_owned()),
            Some(("l", value)) => field.list_type = Some(value.to_owned()),
            Some(("k", value)) => field.list_keys.push(value.to_owned()),
            Some((other, _)) => return Err(format!("unknown flag {other}")),
        }
    }
    Ok(field)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_facts_are_whole() {
        let facts = Facts::parse(TEXT).expect("the file");
        let pod = facts.kind("", "v1", "Pod").expect("Pod");
        let spec = facts.field(pod, "spec").expect("spec");
        let FieldType::Message(spec) = spec.kind else { panic!("spec is a message") };
        let containers = facts.field(spec, "containers").expect("containers");
        assert_eq!((containers.number, containers.merge_key.as_deref()), (2, Some("name")));
        // Inlined: a volume's sources stand beside its name.
        let volumes = facts.field(spec, "volumes").expect("volumes");
        let FieldType::List(item) = &volumes.kind else { panic!("a list") };
        let FieldType::Message(volume) = **item else { panic!("of messages") };
        assert!(facts.field(volume, "configMap").is_some());
        let numbers: Vec<u32> = facts.fields(pod).iter().map(|field| field.number).collect();
        assert_eq!(numbers, [0, 0, 1, 2, 3], "apiVersion, kind, metadata, spec, status");
    }
}
