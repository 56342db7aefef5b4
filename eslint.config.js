import js from "@eslint/js";

export default [
  { ignores: [".*/", "**/node_modules/", "build/", "dist/", "runs/"] },
  js.configs.recommended,
  {
    rules: {
      "no-undef": "off", // tsc knows the browser's names
      "no-var": "error",
      "one-var": ["error", "never"], // the bundler reads one name of each export
      "prefer-const": "error",
      eqeqeq: "error",
    },
  },
];
