//! Writes `k8s-1.36.facts` from the Go sources in Debian's `golang-k8s-api-dev` and `golang-k8s-apimachinery-dev`:
//! names, numbers, types, list and merge keys, defaults. No text of those sources is copied.
//!
//! `orch-facts-generate FOLDER > k8s-1.36.facts`, where FOLDER holds `api/` and `apimachinery/`
//! (`/usr/share/gocode/src/k8s.io` after installing the packages). The format is described in `orch-facts`.

mod go;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, bail};
use go::{Field, Package, Shape};

/// Packages that are read: folder below the argument, Go import path, name prefix of its types.
const PACKAGES: &[(&str, &str)] = &[
    ("api/apps/v1", "io.k8s.api.apps.v1"),
    ("api/authentication/v1", "io.k8s.api.authentication.v1"),
    ("api/authorization/v1", "io.k8s.api.authorization.v1"),
    ("api/autoscaling/v1", "io.k8s.api.autoscaling.v1"),
    ("api/certificates/v1", "io.k8s.api.certificates.v1"),
    ("api/coordination/v1", "io.k8s.api.coordination.v1"),
    ("api/core/v1", "io.k8s.api.core.v1"),
    ("api/discovery/v1", "io.k8s.api.discovery.v1"),
    ("api/events/v1", "io.k8s.api.events.v1"),
    ("api/networking/v1", "io.k8s.api.networking.v1"),
    ("api/policy/v1", "io.k8s.api.policy.v1"),
    ("api/rbac/v1", "io.k8s.api.rbac.v1"),
    ("api/scheduling/v1", "io.k8s.api.scheduling.v1"),
    ("apimachinery/pkg/apis/meta/v1", "io.k8s.apimachinery.pkg.apis.meta.v1"),
];

/// Kinds from which types are followed: package, group, kinds.
const ROOTS: &[(&str, &str, &[&str])] = &[
    ("io.k8s.api.apps.v1", "apps", &["Deployment", "ReplicaSet"]),
    (
        "io.k8s.api.authentication.v1",
        "authentication.k8s.io",
        &["SelfSubjectReview", "TokenRequest", "TokenReview"],
    ),
    (
        "io.k8s.api.authorization.v1",
        "authorization.k8s.io",
        &[
            "LocalSubjectAccessReview",
            "SelfSubjectAccessReview",
            "SelfSubjectRulesReview",
            "SubjectAccessReview",
        ],
    ),
    ("io.k8s.api.autoscaling.v1", "autoscaling", &["Scale"]),
    ("io.k8s.api.certificates.v1", "certificates.k8s.io", &["CertificateSigningRequest"]),
    ("io.k8s.api.coordination.v1", "coordination.k8s.io", &["Lease"]),
    (
        "io.k8s.api.core.v1",
        "",
        &[
            "Binding",
            "ConfigMap",
            "Endpoints",
            "Event",
            "Namespace",
            "Node",
            "Pod",
            "Secret",
            "Service",
            "ServiceAccount",
        ],
    ),
    ("io.k8s.api.discovery.v1", "discovery.k8s.io", &["EndpointSlice"]),
    ("io.k8s.api.events.v1", "events.k8s.io", &["Event"]),
    ("io.k8s.api.networking.v1", "networking.k8s.io", &["NetworkPolicy"]),
    ("io.k8s.api.policy.v1", "policy", &["Eviction"]),
    (
        "io.k8s.api.rbac.v1",
        "rbac.authorization.k8s.io",
        &["ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"],
    ),
    ("io.k8s.api.scheduling.v1", "scheduling.k8s.io", &["PriorityClass"]),
    ("io.k8s.apimachinery.pkg.apis.meta.v1", "meta.k8s.io", &["DeleteOptions", "Status"]),
];

const HEAD: &str = "\
# Facts about the types of the Kubernetes API, version 1.36: names, numbers, keys and defaults.
# Derived from the Kubernetes project's Go types (k8s.io/api, k8s.io/apimachinery), which are licensed under the
# Apache License, Version 2.0; copyright The Kubernetes Authors. Made by orch-facts-generate; do not edit.
#
# T NAME [GROUP VERSION KIND]   a type; a kind has its group (- = core), version and kind
# N TYPE                        the protobuf message only wraps this list
# f JSON NUMBER TYPE FLAGS...   a field: name in JSON (- = inlined), protobuf field number (0 = not on that wire)
#   TYPE: s b i32 i64 f64 y(bytes) q(Quantity) ios(IntOrString) t(Time) mt(MicroTime) raw(RawExtension) fv1(FieldsV1)
#         @NAME  []TYPE  {}TYPE(map of strings)
#   FLAGS: o=omitted when empty  p=pointer  r=required  d=JSON default  m=merge key  s=patch strategy
#          l=list type  k=list map key (repeated)  x=atomic map
";

fn main() -> anyhow::Result<()> {
    let folder =
        std::env::args().nth(1).context("usage: orch-facts-generate FOLDER > k8s-1.36.facts")?;
    let mut packages = BTreeMap::new();
    for (path, prefix) in PACKAGES {
        let package =
            go::read(&Path::new(&folder).join(path)).with_context(|| format!("read {path}"))?;
        packages.insert((*prefix).to_owned(), package);
    }
    let mut writer =
        Writer { packages, queue: Vec::new(), seen: BTreeSet::new(), out: BTreeMap::new() };
    for (prefix, group, kinds) in ROOTS {
        for kind in *kinds {
            let name = format!("{prefix}.{kind}");
            let group = if group.is_empty() { "-" } else { group };
            writer.emit(&name, &format!(" {group} v1 {kind}"))?;
        }
    }
    while let Some(name) = writer.queue.pop() {
        writer.emit(&name, "")?;
    }
    let mut text = HEAD.to_owned();
    for lines in writer.out.values() {
        text.push_str(lines);
    }
    use std::io::Write as _;
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

struct Writer {
    packages: BTreeMap<String, Package>,
    queue: Vec<String>,
    seen: BTreeSet<String>,
    out: BTreeMap<String, String>,
}

impl Writer {
    fn emit(&mut self, name: &str, kind: &str) -> anyhow::Result<()> {
        if !self.seen.insert(name.to_owned()) && kind.is_empty() {
            return Ok(());
        }
        let (prefix, short) = name.rsplit_once('.').context("a type has a package")?;
        let package = self
            .packages
            .get(prefix)
            .with_context(|| format!("{prefix} is not among the packages"))?;
        let Some(Shape::Struct(fields)) = package.types.get(short) else {
            bail!("{name} is no struct");
        };
        let fields: Vec<Field> = fields.clone();
        let mut lines = format!("T {name}{kind}\n");
        for field in fields {
            if field.json == "-" {
                continue;
            }
            let written = self
                .type_text(prefix, &field.go_type)
                .with_context(|| format!("{name}.{}", field.json))?;
            if field.inline
                && field.number == 0
                && written == "@io.k8s.apimachinery.pkg.apis.meta.v1.TypeMeta"
            {
                lines.push_str("f apiVersion 0 s o\nf kind 0 s o\n");
                continue;
            }
            let json = if field.inline { "-" } else { &field.json };
            let mut flags = String::new();
            let mut flag = |text: &str| {
                flags.push(' ');
                flags.push_str(text);
            };
            if field.omitempty {
                flag("o");
            }
            if field.go_type.starts_with('*') {
                flag("p");
            }
            if !field.omitempty && !field.inline && !field.optional {
                flag("r");
            }
            if let Some(value) = &field.default {
                flag(&format!("d={value}"));
            }
            if let Some(key) = &field.merge_key {
                flag(&format!("m={key}"));
            }
            if let Some(strategy) = &field.strategy {
                flag(&format!("s={strategy}"));
            }
            if let Some(kind) = &field.list_type {
                flag(&format!("l={kind}"));
            }
            for key in &field.list_keys {
                flag(&format!("k={key}"));
            }
            if field.atomic_map {
                flag("x");
            }
            lines.push_str(&format!("f {json} {} {written}{flags}\n", field.number));
        }
        self.out.insert(name.to_owned(), lines);
        Ok(())
    }

    /// A Go type in the file's words; structs are queued.
    fn type_text(&mut self, prefix: &str, go_type: &str) -> anyhow::Result<String> {
        let bare = go_type.trim_start_matches('*');
        if bare == "[]byte" {
            return Ok("y".to_owned());
        }
        if let Some(item) = bare.strip_prefix("[]") {
            return Ok(format!("[]{}", self.type_text(prefix, item)?));
        }
        if let Some(rest) = bare.strip_prefix("map[") {
            let (_, value) = rest.split_once(']').context("a map has a value")?;
            return Ok(format!("{{}}{}", self.type_text(prefix, value)?));
        }
        let known = match bare {
            "string" => Some("s"),
            "bool" => Some("b"),
            "int32" | "uint32" | "int" => Some("i32"),
            "int64" | "uint64" => Some("i64"),
            "float64" => Some("f64"),
            _ => None,
        };
        if let Some(known) = known {
            return Ok(known.to_owned());
        }
        let package = self.packages.get(prefix).context("package")?;
        let (home, short) = match bare.split_once('.') {
            Some((alias, short)) => {
                let path = package.imports.get(alias).with_context(|| format!("import {alias}"))?;
                match (path.as_str(), short) {
                    ("k8s.io/apimachinery/pkg/api/resource", "Quantity") => {
                        return Ok("q".to_owned());
                    }
                    ("k8s.io/apimachinery/pkg/util/intstr", "IntOrString") => {
                        return Ok("ios".to_owned());
                    }
                    ("k8s.io/apimachinery/pkg/runtime", _) => return Ok("raw".to_owned()),
                    ("k8s.io/apimachinery/pkg/types", _) => return Ok("s".to_owned()),
                    _ => {}
                }
                let found = PACKAGES.iter().find(|(folder, _)| format!("k8s.io/{folder}") == *path);
                (found.with_context(|| format!("package {path}"))?.1.to_owned(), short.to_owned())
            }
            None => (prefix.to_owned(), bare.to_owned()),
        };
        if home == "io.k8s.apimachinery.pkg.apis.meta.v1" {
            match short.as_str() {
                "Time" => return Ok("t".to_owned()),
                "MicroTime" => return Ok("mt".to_owned()),
                "FieldsV1" => return Ok("fv1".to_owned()),
                _ => {}
            }
        }
        let shape = self.packages.get(&home).and_then(|package| package.types.get(&short)).cloned();
        match shape.with_context(|| format!("{home} has no type {short}"))? {
            Shape::Struct(_) => {
                let name = format!("{home}.{short}");
                self.queue.push(name.clone());
                Ok(format!("@{name}"))
            }
            // protobuf has no named lists: generated code wraps them into a message.
            Shape::Alias(of) if of.starts_with("[]") && of != "[]byte" => {
                let name = format!("{home}.{short}");
                let item = self.type_text(&home, &of)?;
                self.seen.insert(name.clone());
                self.out.insert(name.clone(), format!("T {name}\nN {item}\n"));
                Ok(format!("@{name}"))
            }
            Shape::Alias(of) => self.type_text(&home, &of),
        }
    }
}
