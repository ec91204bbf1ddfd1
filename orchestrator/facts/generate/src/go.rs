//! As much of Go as the API's `types.go` files use: structs with tags, named types, imports, comment markers.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use regex::Regex;

/// What a type declaration says.
#[derive(Debug, Clone)]
pub(crate) enum Shape {
    Struct(Vec<Field>),
    /// Another name for a type.
    Alias(String),
}

/// A field of a struct.
#[derive(Debug, Clone, Default)]
pub(crate) struct Field {
    pub(crate) json: String,
    pub(crate) inline: bool,
    pub(crate) omitempty: bool,
    pub(crate) optional: bool,
    /// Protobuf field number; 0 = none.
    pub(crate) number: u32,
    pub(crate) go_type: String,
    pub(crate) strategy: Option<String>,
    pub(crate) merge_key: Option<String>,
    pub(crate) list_type: Option<String>,
    pub(crate) list_keys: Vec<String>,
    pub(crate) atomic_map: bool,
    pub(crate) default: Option<String>,
}

/// The declarations of a package.
#[derive(Debug, Default)]
pub(crate) struct Package {
    pub(crate) types: BTreeMap<String, Shape>,
    /// Import paths by the name they have in the package.
    pub(crate) imports: BTreeMap<String, String>,
}

/// Reads the files of a package that declare types.
///
/// # Errors
/// The folder cannot be read.
pub(crate) fn read(folder: &Path) -> anyhow::Result<Package> {
    let mut package = Package::default();
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name =
            path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let generated = name.starts_with("zz_")
            || name.starts_with("generated")
            || name.contains("_test")
            || name.contains("swagger");
        if name.ends_with(".go") && !generated {
            parse(&std::fs::read_to_string(&path)?, &mut package)?;
        }
    }
    Ok(package)
}

fn parse(text: &str, package: &mut Package) -> anyhow::Result<()> {
    let import = Regex::new(r#"^(?:import )?\s*(\w+)?\s*"([^"]+)"$"#)?;
    let declaration = Regex::new(r"^type (\w+) (struct \{|.+)$")?;
    let field = Regex::new(r"^\t(?:(\w+)\s+)?([\w.*\[\]]+)\s+`(.*)`")?;
    let mut lines = text.lines().peekable();
    let mut markers: Vec<String> = Vec::new();
    while let Some(line) = lines.next() {
        if let Some(found) = import.captures(line) {
            let path = found[2].to_owned();
            let last = path.rsplit('/').next().unwrap_or_default().to_owned();
            package
                .imports
                .insert(found.get(1).map_or(last, |alias| alias.as_str().to_owned()), path);
            continue;
        }
        let Some(found) = declaration.captures(line) else { continue };
        let name = found[1].to_owned();
        if &found[2] != "struct {" {
            let of = found[2]
                .trim_start_matches("= ")
                .split("//")
                .next()
                .unwrap_or_default()
                .trim()
                .to_owned();
            if of != "struct{}" && !of.starts_with("interface") && !of.starts_with("func") {
                package.types.insert(name, Shape::Alias(of));
            }
            continue;
        }
        let mut fields = Vec::new();
        markers.clear();
        for line in lines.by_ref() {
            if line == "}" {
                break;
            }
            let trimmed = line.trim();
            if let Some(comment) = trimmed.strip_prefix("//") {
                markers.push(comment.trim().to_owned());
                continue;
            }
            if let Some(found) = field.captures(line) {
                fields.extend(read_field(&found[2], &found[3], &markers));
            }
            markers.clear();
        }
        package.types.insert(name, Shape::Struct(fields));
    }
    Ok(())
}

fn tag<'a>(tags: &'a str, key: &str) -> Option<&'a str> {
    let start = tags.find(&format!("{key}:\""))? + key.len() + 2;
    let rest = &tags[start..];
    Some(&rest[..rest.find('"')?])
}

fn read_field(go_type: &str, tags: &str, markers: &[String]) -> Option<Field> {
    let json = tag(tags, "json")?;
    let mut parts = json.split(',');
    let name = parts.next().unwrap_or_default();
    let options: Vec<&str> = parts.collect();
    let inline =
        options.contains(&"inline") || (name.is_empty() && !options.contains(&"omitempty"));
    let marker =
        |key: &str| markers.iter().find_map(|marker| marker.strip_prefix(key)).map(str::to_owned);
    let number = tag(tags, "protobuf")
        .and_then(|text| text.split(',').nth(1))
        .and_then(|number| number.parse().ok())
        .unwrap_or(0);
    Some(Field {
        json: name.to_owned(),
        inline,
        omitempty: options.contains(&"omitempty") || options.contains(&"omitzero"),
        optional: markers.iter().any(|marker| marker == "+optional"),
        number,
        go_type: go_type.to_owned(),
        strategy: tag(tags, "patchStrategy").map(str::to_owned),
        merge_key: tag(tags, "patchMergeKey").map(str::to_owned),
        list_type: marker("+listType="),
        list_keys: markers
            .iter()
            .filter_map(|marker| marker.strip_prefix("+listMapKey="))
            .map(str::to_owned)
            .collect(),
        atomic_map: markers
            .iter()
            .any(|marker| marker == "+mapType=atomic" || marker == "+structType=atomic"),
        default: marker("+default=")
            .filter(|value| !value.starts_with("ref("))
            .map(|value| value.replace(' ', "")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_struct_is_read_with_its_tags_and_markers() {
        let text = "import (\n\tmetav1 \"k8s.io/apimachinery/pkg/apis/meta/v1\"\n)\n\ntype Phase string\n\ntype A struct {\n\tmetav1.TypeMeta `json:\",inline\"`\n\t// words\n\t// +optional\n\t// +listType=map\n\t// +listMapKey=name\n\t// +default=\"x\"\n\tItems []B `json:\"items,omitempty\" patchStrategy:\"merge\" patchMergeKey:\"name\" protobuf:\"bytes,3,rep,name=items\"`\n}\n";
        let mut package = Package::default();
        parse(text, &mut package).expect("Go");
        assert_eq!(package.imports["metav1"], "k8s.io/apimachinery/pkg/apis/meta/v1");
        let Some(Shape::Struct(fields)) = package.types.get("A") else { panic!("A is a struct") };
        assert!(fields[0].inline && fields[0].number == 0);
        assert_eq!(
            (fields[1].json.as_str(), fields[1].number, fields[1].go_type.as_str()),
            ("items", 3, "[]B")
        );
        assert_eq!(
            (fields[1].merge_key.as_deref(), fields[1].list_keys.as_slice()),
            (Some("name"), &["name".to_owned()][..])
        );
        assert_eq!(fields[1].default.as_deref(), Some("\"x\""));
        assert!(matches!(package.types.get("Phase"), Some(Shape::Alias(of)) if of == "string"));
    }
}
